"""A plain, physically pruned checkpoint: what any Transformers or vLLM serves without this package.

Tensors of removed blocks are left out, the others' names renumbered, and what config.json says of
each layer is cut to fit. Bytes are copied as they are, a piece at a time, so a dtype need not be
known and a checkpoint of any size takes a few megabytes of memory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from sleb_serve.checkpoint import LAYER_COUNT_KEYS, Checkpoint, tensors_of
from sleb_serve.errors import SlebError, first_line
from sleb_serve.manifest import Manifest
from sleb_serve.pruning import Pruning
from sleb_serve.sidecar import check_sidecar

MANIFEST_NAME = "sleb_manifest.json"
"""The manifest inside an exported folder."""

_PER_LAYER = frozenset(
    [
        "layer_types",
        "mlp_layer_types",
        "layers_block_type",
        "no_rope_layers",
        "block_configs",
        "attn_layer_types",
        "num_attention_heads",
        "num_key_value_heads",
        "num_query_heads",
        "intermediate_size",
        "head_dim",
        "ffn_multipliers",
        "attention_layers",
        "sliding_window_layers",
        "hybrid_layer_pattern",
        "activation_sparsity_pattern",
        "partial_rotary_factors",
        "moe_layer_freq",
        "swiglu_limits",
    ]
)
"""Keys of config.json that may hold one value a layer."""
_LAYER_NUMBERS = frozenset(
    [
        "mlp_only_layers",
        "moe_layers",
        "global_attn_layers",
        "full_attn_idxs",
        "attn_layer_indices",
        "dense_layers",
        "cross_attention_layers",
    ]
)
"""Keys that list layers by number."""
_FIRST_LAYERS = frozenset(("first_k_dense_replace", "max_window_layers", "num_dense_layers"))
"""Keys that count the first layers of a kind."""
_EVERY_NTH = {
    "decoder_sparse_step": None,
    "moe_layer_freq": None,
    "interleave_moe_layer_step": "moe_layers",
    "expert_layer_period": None,
    "attn_layer_period": None,
    "moe_every_n_layers": None,
    "sliding_window_pattern": "layer_types",
    "full_attention_interval": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
}
"""Keys by which every nth layer is of a kind, which is no longer so with layers gone; and the list
that says the same of each layer and takes precedence, if there is one."""
_NUMBERED = frozenset(("scale_attn_by_inverse_layer_idx",))
"""Keys that make a layer compute with its own number."""
_NOT_PER_LAYER = frozenset(("architectures", "eos_token_id", "bos_token_id", "pad_token_id"))
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx|index\.json|ot)|config\.json|\..*"
)
_CHUNK = 1 << 24
_SINGLE = "model.safetensors"
_INSTEAD = "serve it with sleb-serve serve instead"


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: where.
        blocks: how many are left.
        shards: files of weights.
        size: bytes of tensors.
        source_size: bytes of the source's tensors.
    """

    folder: Path
    blocks: int
    shards: int
    size: int
    source_size: int


@dataclass(frozen=True)
class _Piece:
    """One tensor on its way: its new name, what the header says of it, where its bytes are."""

    name: str
    dtype: str
    shape: list[int]
    file: Path
    start: int
    end: int


def export(
    checkpoint: Checkpoint,
    manifest: Manifest,
    folder: Path,
    on_shard: Callable[[int, int], None] = lambda number, count: None,
) -> Exported:
    """Write the pruned model of `checkpoint` to `folder`, whole or not at all.

    Args:
        checkpoint: the dense model, which `manifest` was held against.
        manifest: what is removed; a folded repair is put in place.
        folder: must not be there, or be empty.
        on_shard: called after each shard, with how many there are now and in all.

    Raises:
        SlebError: the model cannot be expressed without these blocks, or a file cannot be written.
    """
    pruning = manifest.pruning()
    config = cut_config(checkpoint, pruning.removed)
    replaced = _folded(pruning)
    shards = _shards(checkpoint, pruning, replaced)
    if replaced:
        raise SlebError(
            f"the repair holds {', '.join(sorted(replaced))}, which the checkpoint does not; "
            f"select with --repair anew"
        )
    size = sum(piece.end - piece.start for shard in shards for piece in shard)
    sizes = checkpoint.tensor_bytes(frozenset(pruning.removed))
    with _whole_folder(folder) as temporary:
        names = [
            f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else _SINGLE
            for number in range(1, len(shards) + 1)
        ]
        for number, (name, shard) in enumerate(zip(names, shards, strict=True), 1):
            _write_shard(temporary / name, shard)
            on_shard(number, len(shards))
        if len(shards) > 1:
            places = {
                piece.name: name
                for name, shard in zip(names, shards, strict=True)
                for piece in shard
            }
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
            _write_json(temporary / f"{_SINGLE}.index.json", index)
        for file in sorted(checkpoint.path.iterdir()):
            if file.is_file() and not _WEIGHTS.fullmatch(file.name):
                shutil.copyfile(file, temporary / file.name)
        manifest.write(temporary / MANIFEST_NAME)
        _write_json(temporary / "config.json", config)
    return Exported(folder, pruning.num_kept, len(shards), size, sum(sizes or ()))


def cut_config(checkpoint: Checkpoint, removed: Sequence[int]) -> dict[str, Any]:
    """config.json for the layers that are left.

    Raises:
        SlebError: it says of the layers what cannot be said once some are gone, or what this
            function does not know.
    """
    count, gone = checkpoint.num_blocks, set(removed)
    kept = [index for index in range(count) if index not in gone]
    places = {old: new for new, old in enumerate(kept)}
    config = dict(checkpoint.config)
    for key, value in checkpoint.config.items():
        number = value if isinstance(value, int) and not isinstance(value, bool) else None
        if key in LAYER_COUNT_KEYS and number == count:
            config[key] = len(kept)
        elif key in _LAYER_NUMBERS and isinstance(value, list):
            config[key] = [places[index] for index in value if index in places]
        elif key in _FIRST_LAYERS and number is not None:
            config[key] = sum(index < number for index in kept)
        elif key in _PER_LAYER and _is_per_layer(value, count):
            config[key] = [value[index] for index in kept]
        elif key in _EVERY_NTH and number is not None and number > 1:
            if not isinstance(checkpoint.config.get(_EVERY_NTH[key] or ""), list):
                raise SlebError(
                    f"{checkpoint.path}/config.json makes every {number}th layer another kind "
                    f"({key}), which is no longer so without some; {_INSTEAD}"
                )
        elif key in _NUMBERED and value:
            raise SlebError(
                f"{checkpoint.path}/config.json has {key}: layers compute with their own number, "
                f"which changes when layers before them go; {_INSTEAD}"
            )
        elif _is_per_layer(value, count) and key not in _PER_LAYER | _NOT_PER_LAYER:
            raise SlebError(
                f"{checkpoint.path}/config.json lists {count} values under {key}, one a layer as "
                f"it seems, which this version does not know; {_INSTEAD}"
            )
    if isinstance(quantisation := config.get("quantization_config"), dict):
        config["quantization_config"] = _renumbered(quantisation, places, count)
    return config


def _is_per_layer(value: object, count: int) -> bool:
    return isinstance(value, list) and len(value) == count > 1


def _renumbered(value: Any, places: Mapping[int, int], count: int) -> Any:
    """Names of modules in a quantisation's config, renumbered; those of removed layers go."""
    if isinstance(value, dict):
        pairs = ((_new_name(k, places, count), v) for k, v in value.items())
        return {k: _renumbered(v, places, count) for k, v in pairs if k is not None}
    if isinstance(value, list):
        texts = [_new_name(v, places, count) if isinstance(v, str) else v for v in value]
        return [
            _renumbered(new, places, count)
            for old, new in zip(value, texts, strict=True)
            if new is not None or old is None
        ]
    return value


def _new_name(name: str, places: Mapping[int, int], count: int) -> str | None:
    """A module's name with its layer renumbered; None if that is removed."""
    parts = name.split(".")
    number = next((int(part) for part in parts if part.isdecimal()), count)
    if number >= count:
        return name
    if re.search(r"[\[\](){}|*+?^$\\]", name):
        raise SlebError(
            f"the quantisation's config names layers by the pattern {name}, which cannot be "
            f"renumbered; {_INSTEAD}"
        )
    return ".".join(_moved(parts, places[number])) if number in places else None


def _moved(parts: Sequence[str], place: int) -> list[str]:
    """The parts of a name with the first number among them replaced."""
    at = next(i for i, part in enumerate(parts) if part.isdecimal())
    return [*parts[:at], str(place), *parts[at + 1 :]]


def _folded(pruning: Pruning) -> dict[str, _Piece]:
    """The tensors of a folded repair, by the checkpoint's names."""
    if pruning.repair is None:
        return {}
    if pruning.repair.kind != "fold":
        raise SlebError(
            f"--repair {pruning.repair.kind} adds to the stream what no plain checkpoint has a "
            f"place for; serve it with sleb-serve serve, or select with --repair fold"
        )
    check_sidecar(pruning.repair)
    file = Path(pruning.repair.path)
    return {
        name: _Piece(name, dtype, shape, file, start, end)
        for name, (dtype, shape, start, end) in tensors_of(file)
    }


def _shards(
    checkpoint: Checkpoint, pruning: Pruning, replaced: dict[str, _Piece]
) -> list[list[_Piece]]:
    """What each shard will hold, as the source's are cut; what was put in place leaves `replaced`.

    Raises:
        SlebError: the weights are not safetensors.
    """
    removed = frozenset(pruning.removed)
    kept = [index for index in range(pruning.num_blocks) if index not in removed]
    places = {old: new for new, old in enumerate(kept)}
    files = checkpoint.weight_files(removed)
    if files[0].suffix != ".safetensors":
        raise SlebError(
            f"{checkpoint.path} holds PyTorch's own format; save it as safetensors first "
            f"(model.save_pretrained)"
        )
    shards = []
    for file in files:
        pieces = []
        for name, (dtype, shape, start, end) in tensors_of(file):
            index = checkpoint.block_of(name)
            if index in removed:
                continue
            piece = _Piece(name, dtype, shape, file, start, end)
            if name in replaced:
                new = replaced.pop(name)
                if (new.dtype, new.shape) != (dtype, shape):
                    raise SlebError(
                        f"the repair of {name} is {new.dtype} {new.shape}, the checkpoint's is "
                        f"{dtype} {shape}; select with --repair in the checkpoint's dtype"
                    )
                piece = new
            if index is not None:
                renamed = ".".join(_moved(name.split("."), places[index]))
                piece = _Piece(renamed, dtype, shape, piece.file, piece.start, piece.end)
            pieces.append(piece)
        if pieces:
            shards.append(pieces)
    return shards


def _write_shard(path: Path, pieces: Sequence[_Piece]) -> None:
    """A safetensors file; https://github.com/huggingface/safetensors#format."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for piece in pieces:
        end = offset + piece.end - piece.start
        header[piece.name] = {
            "dtype": piece.dtype,
            "shape": piece.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as target:
        target.write(struct.pack("<Q", len(text)) + text)
        sources: dict[Path, BinaryIO] = {}
        try:
            for piece in pieces:
                if piece.file not in sources:
                    sources[piece.file] = piece.file.open("rb")
                _copy(sources[piece.file], piece.start, piece.end, target)
        finally:
            for source in sources.values():
                source.close()
        target.flush()
        os.fsync(target.fileno())


def _copy(source: BinaryIO, start: int, end: int, target: BinaryIO) -> None:
    source.seek(start)
    while start < end:
        data = source.read(min(_CHUNK, end - start))
        if not data:
            raise OSError(f"{source.name} ended before its last tensor")
        target.write(data)
        start += len(data)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that becomes `folder` at the end, or is taken away.

    Raises:
        SlebError: there is something at `folder` already, or it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SlebError(f"cannot write {folder}: it is there already; give a new folder")
    if not folder.absolute().parent.is_dir():
        raise SlebError(f"cannot write {folder}: there is no folder {folder.parent}")
    temporary: Path | None = None
    try:
        temporary = Path(
            tempfile.mkdtemp(dir=folder.absolute().parent, prefix=f".{folder.name}.incomplete-")
        )
        yield temporary
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
        os.replace(temporary, folder)
    except OSError as error:
        raise SlebError(
            f"cannot write {folder}: {first_line(error)}; nothing was left there"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
