"""A model as files: where they lie, what its config says, and the digests that name it.

Needs neither torch nor transformers, so a manifest can be held against a checkpoint on any machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from sleb_serve.cut.config import (
    COUNT_KEYS,
    TOWERS,
    Cut,
    at,
    count_of,
    cut_config,
    decoder_path,
    decoder_prefix,
    explicit,
    number_after,
    with_names,
)
from sleb_serve.cut.quantisation import QUANTISATION_FILES, QUANTISATION_KEYS, Names, renumbered
from sleb_serve.errors import SlebError, first_line
from sleb_serve.protocol import CONFIG_KEY, without_guard
from sleb_serve.utils import strict_json

# Keys of config.json that say how it was written or loaded, not what the model computes. The same
# weights saved by another version of Transformers must keep their digest.
_NOT_THE_MODEL = frozenset(
    {"_name_or_path", "_model_name_or_path", "transformers_version", "torch_dtype", "dtype"}
    | {"use_cache", "architectures_version", CONFIG_KEY}
)
_WEIGHT_FILES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_QUANTISATION = QUANTISATION_KEYS[0]
_NOTHING: Mapping[int, str] = MappingProxyType({})
_CONFIG_MAX_BYTES = 16 << 20
_HEADER_MAX_BYTES = 100 << 20
"""The limit of the safetensors library itself."""
_SAMPLES = 4
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Checkpoint:
    """A model folder whose config.json has been read."""

    path: Path
    config: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        """The model class that config.json names first.

        Raises:
            SlebError: it names none.
        """
        names = self.config.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise SlebError(
                f"{self.path}/config.json names no architecture; add the model's class under "
                f'"architectures", as Transformers writes it'
            )
        return names[0]

    @property
    def num_blocks(self) -> int:
        """How many decoder blocks config.json counts.

        Raises:
            SlebError: it does not say.
        """
        count = count_of(self.decoder_config)
        if count is None:
            raise SlebError(
                f"{self.path}/config.json does not say how many layers the model has (looked for "
                f"{', '.join(COUNT_KEYS)}, also in its text_config); give a model with a decoder"
            )
        return count

    @property
    def decoder_config(self) -> Mapping[str, Any]:
        """What config.json says of the decoder: all of it, or a nested config."""
        path = decoder_path(self.config)
        return self.config if path is None else at(self.config, path) or {}

    @cached_property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of all tensors; of shards that are not there, as the index says.

        Raises:
            SlebError: there are no weights, or a file is cut short.
        """
        for single, index in _WEIGHT_FILES:
            if (self.path / single).is_file():
                return tuple(_names_in(self.path / single))
            if (self.path / index).is_file():
                return tuple(_weight_map(self.path / index))
        self.weight_files()
        return ()

    @cached_property
    def layer_prefix(self) -> str:
        """What comes before the decoder's layer numbers in tensors' names.

        Raises:
            SlebError: the weights are of fewer layers than config.json counts.
        """
        try:
            return decoder_prefix(self.tensor_names, self.num_blocks)
        except SlebError as error:
            raise SlebError(f"{self.path}: {error}") from None

    def check_layers(self) -> None:
        """Refuse weights of other layers than config.json counts; see `layer_prefix`."""
        _ = self.layer_prefix

    def module_names(self, cut: Cut) -> Names:
        """The modules that have weights, and their names once `cut`."""
        prefix = self.layer_prefix
        return Names(
            modules=frozenset(name.rpartition(".")[0] for name in self.tensor_names),
            rename=lambda name: cut.name(name, prefix),
            place=cut.place,
            prefix=prefix,
            num_blocks=cut.num_blocks,
            others=TOWERS,
        )

    def cut_config(self, cut: Cut, derived: Mapping[str, Any] | None) -> dict[str, Any]:
        """config.json of the shorter model.

        Args:
            cut: the layers that go.
            derived: what Transformers makes of config.json; None where it does not know the model.

        Raises:
            SlebError: it cannot be said of fewer layers; the message names the key.
        """
        config = self.config if derived is None else explicit(self.config, derived)
        try:
            return cut_config(config, cut, self.module_names(cut))
        except SlebError as error:
            raise SlebError(f"{self.path}/config.json: {error}") from None

    def is_quantised(self) -> bool:
        """Whether config.json or a file beside it says how the weights are quantised."""
        inside = (
            c.get(key) for c in (self.config, self.decoder_config) for key in QUANTISATION_KEYS
        )
        return any(isinstance(value, Mapping) for value in inside) or bool(
            self.quantisation_files()
        )

    def quantisation_files(self) -> dict[str, Any]:
        """Contents of the files beside config.json that say how the checkpoint is quantised."""
        files = (self.path / name for name in QUANTISATION_FILES)
        found = {file.name: _json(file) for file in files if file.is_file()}
        for name, content in found.items():
            if not isinstance(content, dict):
                raise SlebError(f"{self.path / name} holds no object; download the model again")
        return found

    def cut_quantisation_files(self, cut: Cut) -> dict[str, Any]:
        """These files' contents for the shorter model."""
        files = self.quantisation_files()
        if not files:
            return {}
        names = self.module_names(cut)
        return {name: renumbered(content, names) for name, content in files.items()}

    def with_quantisation(self, config: Mapping[str, Any], cut: Cut) -> dict[str, Any]:
        """A config with the layers that its quantisation names numbered as in the shorter model.

        Args:
            config: the dense one. Where it says nothing of a quantisation that a file beside it
                does, the file's content is put into the result.
            cut: the layers that go.
        """
        result = dict(config)
        beside = self.quantisation_files()
        own = result.get(_QUANTISATION)
        inner = (at(result, decoder_path(result) or ()) or {}).get(_QUANTISATION)
        more = beside.get(QUANTISATION_FILES[0], {}).get("quantization")
        if not isinstance(own, Mapping) and not isinstance(inner, Mapping) and beside:
            result[_QUANTISATION] = next(iter(beside.values()))
        elif isinstance(own, Mapping) and isinstance(more, Mapping) and "quantized_layers" in more:
            # ModelOpt's list of layers by name may be in the file alone.
            result[_QUANTISATION] = {"quantized_layers": more["quantized_layers"], **own}
        return with_names(result, self.module_names(cut))

    @property
    def dtype(self) -> str:
        """The dtype of the weights, as config.json says; Transformers takes float32 without."""
        for config in (self.config, self.decoder_config):
            for key in ("dtype", "torch_dtype"):
                if isinstance(name := config.get(key), str):
                    return name
        return "float32"

    def config_sha256(self) -> str:
        """Digest of config.json without the keys that say how it was written or loaded."""
        kept = {key: value for key, value in self.config.items() if key not in _NOT_THE_MODEL}
        return hashlib.sha256(strict_json.canonical(kept)).hexdigest()

    def weight_files(self, without: frozenset[int] = frozenset()) -> tuple[Path, ...]:
        """The files that hold the weights, safetensors before PyTorch's, as Transformers prefers.

        Args:
            without: blocks whose weights are not wanted; shards that hold nothing else are left
                out, and need not be there.

        Raises:
            SlebError: there are none, or the index names a file that is not there.
        """
        for single, index in _WEIGHT_FILES:
            if (self.path / single).is_file():
                return (self.path / single,)
            if (self.path / index).is_file():
                wanted = set(_weight_map(self.path / index).values()) - self.unneeded_files(without)
                files = tuple(self.path / name for name in sorted(wanted))
                missing = next((file for file in files if not file.is_file()), None)
                if missing is not None:
                    raise SlebError(
                        f"{self.path} lacks the checkpoint shard {missing.name} that {index} "
                        f"names; download the model again"
                    )
                return files
        raise SlebError(
            f"{self.path} holds no weights (looked for model.safetensors and pytorch_model.bin, "
            f"whole or with an index); give a complete Transformers checkpoint"
        )

    def unneeded_files(self, without: frozenset[int]) -> frozenset[str]:
        """Names of the shards, there or not, that hold nothing but blocks in `without`."""
        for single, index in _WEIGHT_FILES:
            if (self.path / single).is_file():
                break
            if (self.path / index).is_file():
                places = _weight_map(self.path / index)
                wanted = {f for name, f in places.items() if self.block_of(name) not in without}
                return frozenset(places.values()) - wanted
        return frozenset()

    def block_sha256(self, without: frozenset[int] = frozenset()) -> tuple[str, ...] | None:
        """The digest of each block's weights, and before them that of what lies outside; see
        `weights_sha256`. None for a checkpoint in PyTorch's own format.

        The weights of blocks in `without` are not read; their digests are those of no weights.
        """  # noqa: D205
        files = self.weight_files(without)
        if files[0].suffix != ".safetensors":
            return None
        outside, *blocks = (hashlib.sha256() for _ in range(self.num_blocks + 1))
        tensors = sorted((name, *entry, file) for file in files for name, entry in tensors_of(file))
        for name, dtype, shape, start, end, file in tensors:
            index = self.block_of(name)
            if index in without:
                continue
            digest = outside if index is None else blocks[index]
            digest.update(strict_json.canonical([name, dtype, shape]))
            with file.open("rb") as stream:
                _sample(stream, start, end, digest.update)
        return tuple(digest.hexdigest() for digest in (outside, *blocks))

    def weights_sha256(self, known: Mapping[int, str] = _NOTHING) -> str:
        """Digest over every tensor's name, dtype, shape and a sample of its bytes.

        Four chunks of 4 KiB, evenly spaced, are read of each tensor, and small tensors whole: a
        70B model costs a few thousand small reads, and a fine-tuned sibling differs in all of
        them. It is the digest of a list of digests, one for what lies outside the decoder blocks
        and then one per block, each over its tensors by name; so it does not depend on how the
        tensors are spread over shards. A checkpoint in PyTorch's own format is sampled file by
        file instead.

        Args:
            known: digests of blocks that are not to be read. Wrong ones give a wrong result.

        Raises:
            SlebError: weights are missing or a file is cut short.
        """
        leaves = self.block_sha256(frozenset(known))
        if leaves is not None:
            mended = [known.get(i - 1, leaf) for i, leaf in enumerate(leaves)]
            return hashlib.sha256(strict_json.canonical(mended)).hexdigest()
        whole = hashlib.sha256()
        for file in self.weight_files():
            size = file.stat().st_size
            whole.update(strict_json.canonical([file.name, size]))
            with file.open("rb") as stream:
                _sample(stream, 0, size, whole.update)
        return whole.hexdigest()

    def tensor_bytes(self, without: frozenset[int]) -> tuple[int, int] | None:
        """Bytes of the tensors outside the blocks in `without`, and of those inside.

        The latter without shards that hold nothing else and are not on this machine. None for a
        checkpoint in PyTorch's own format.
        """
        files = self.weight_files(without)
        if files[0].suffix != ".safetensors":
            return None
        rest = [self.path / name for name in sorted(self.unneeded_files(without))]
        outside = inside = 0
        for file in (*files, *(file for file in rest if file.is_file())):
            for name, (_, _, start, end) in tensors_of(file):
                if self.block_of(name) in without:
                    inside += end - start
                else:
                    outside += end - start
        return outside, inside

    def block_of(self, name: str) -> int | None:
        """The decoder block that a tensor belongs to; None outside them."""
        index = number_after(name, self.layer_prefix)
        return index if index is not None and index < self.num_blocks else None

    def parameter_counts(self) -> tuple[int, list[int]] | None:
        """Parameters outside the decoder blocks, and of each; None for a PyTorch checkpoint."""
        files = self.weight_files()
        if files[0].suffix != ".safetensors":
            return None
        outside, counts = 0, [0] * self.num_blocks
        for file in files:
            for name, (_, shape, _, _) in tensors_of(file):
                index = self.block_of(name)
                if index is None:
                    outside += math.prod(shape)
                else:
                    counts[index] += math.prod(shape)
        return outside, counts


def open_checkpoint(
    model: str, revision: str | None = None, cache_dir: str | None = None
) -> Checkpoint:
    """Find `model`'s config.json: a local folder, or a hub id whose config is fetched if need be.

    Args:
        model: a folder, or an id on the Hugging Face hub.
        revision: branch, tag or commit on the hub; None for the default.
        cache_dir: where hub models are kept on this machine; None for the hub library's default.

    Raises:
        SlebError: there is no such model, or its config.json is not an object.
    """
    path = Path(model)
    if path.is_dir():
        file = path / "config.json"
        if not file.is_file():
            raise SlebError(
                f"{model} is a folder without config.json; give a Transformers checkpoint folder"
            )
    elif path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise SlebError(f"no such model: {model} is no folder; give a checkpoint folder or hub id")
    else:
        file = Path(_hub_file(model, "config.json", revision, cache_dir))
    try:
        with file.open("rb") as stream:
            data = stream.read(_CONFIG_MAX_BYTES + 1)
        config = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise SlebError(
            f"cannot read {file}: {first_line(error)}; download the model again"
        ) from error
    if len(data) > _CONFIG_MAX_BYTES or not isinstance(config, dict):
        raise SlebError(f"{file} is not a model config; give a Transformers checkpoint")
    return Checkpoint(path=file.parent, config=without_guard(config))


def download_weights(model: str, revision: str | None = None) -> None:
    """Bring a hub model's files into the local cache, as `from_pretrained` would.

    `Checkpoint.path` of a hub id is its snapshot folder, so its digests can be taken afterwards.

    Raises:
        SlebError: the hub cannot be reached or has no such model.
    """
    if Path(model).is_dir():
        return
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "tokenizer*", "*.jinja", "*.txt", "*.model"]
    try:
        found = snapshot_download(model, revision=revision, allow_patterns=patterns)
        if not any(Path(found).glob("*.safetensors")):
            snapshot_download(model, revision=revision, allow_patterns=[*patterns, "*.bin"])
    except Exception as error:
        raise _no_such_model(model, error) from error


def fetch_index(model: str, revision: str | None = None, cache_dir: str | None = None) -> bool:
    """Bring a hub model's index of shards into the local cache.

    Returns:
        Whether it is there; False for a folder, and a model with its weights in one file.
    """
    if Path(model).is_dir():
        return False
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for _, index in _WEIGHT_FILES:
        with contextlib.suppress(EntryNotFoundError, LocalEntryNotFoundError):
            hf_hub_download(model, index, revision=revision, cache_dir=cache_dir)
            return True
    return False


def _hub_file(model: str, name: str, revision: str | None, cache_dir: str | None) -> str:
    from huggingface_hub import hf_hub_download

    try:
        return str(hf_hub_download(model, name, revision=revision, cache_dir=cache_dir))
    except Exception as error:
        raise _no_such_model(model, error) from error


def _no_such_model(model: str, error: Exception) -> SlebError:
    why = "the hub is not to be reached and the model is not in the local cache"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        why = "no such folder here, and HF_HUB_OFFLINE forbids asking the hub"
    elif type(error).__name__ not in {"LocalEntryNotFoundError", "OfflineModeIsEnabled"}:
        why = first_line(error)
    return SlebError(f"no such model: {model} ({why}); give a checkpoint folder or a hub id")


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SlebError(
            f"cannot read {file}: {first_line(error)}; download the model again"
        ) from error


def _names_in(file: Path) -> list[str]:
    if file.suffix == ".safetensors":
        return [name for name, _ in tensors_of(file)]
    import torch

    try:
        weights = torch.load(file, map_location="meta", mmap=True, weights_only=True)
    except Exception as error:
        raise SlebError(
            f"cannot read {file}: {first_line(error)}; download the model again"
        ) from error
    return list(weights)


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index of shards says."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = set(weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SlebError(
            f"cannot read {index}: {first_line(error)}; download the model again"
        ) from error
    if not names or any(not isinstance(n, str) or Path(n).name != n for n in names):
        raise SlebError(f"{index} does not name shard files; download the model again")
    return dict(weight_map)


def tensors_of(file: Path) -> Iterator[tuple[str, tuple[str, list[int], int, int]]]:
    """(name, (dtype, shape, first byte, byte after the last)) of each tensor of a safetensors file.

    The format: https://github.com/huggingface/safetensors#format
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(_HEADER_MAX_BYTES, size):
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            if not 0 <= begin <= end <= size - 8 - length:
                raise ValueError(f"tensor {name} lies outside the file")
            yield name, (entry["dtype"], entry["shape"], 8 + length + begin, 8 + length + end)
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SlebError(
            f"{file} is not a whole safetensors file: {first_line(error)}; download the model again"
        ) from error


def _sample(stream: BinaryIO, start: int, end: int, update: Any) -> None:
    size = end - start
    if size <= _SAMPLES * _SAMPLE_BYTES:
        offsets, length = [0], size
    else:
        length = _SAMPLE_BYTES
        offsets = [i * (size - length) // (_SAMPLES - 1) for i in range(_SAMPLES)]
    for offset in offsets:
        stream.seek(start + offset)
        update(stream.read(length))
