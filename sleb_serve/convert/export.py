"""Export of a physically pruned checkpoint that any Transformers or vLLM can load.

Tensors of removed blocks are dropped, the others renumbered, and the per-layer entries of
config.json shortened. Bytes are copied unchanged in chunks, so any dtype works and memory use stays
at a few megabytes.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.checkpoint.safetensors import tensors_of
from sleb_serve.cut.config import Cut
from sleb_serve.cut.servable import exported_config
from sleb_serve.cut.written import written_quantisation
from sleb_serve.errors import SlebError, first_line
from sleb_serve.manifest.binding import check_model, revision_of
from sleb_serve.manifest.pruning import Pruning
from sleb_serve.manifest.repair_file import WeightChanges, read_sidecar
from sleb_serve.manifest.repository import MANIFEST_NAME
from sleb_serve.manifest.schema import Manifest
from sleb_serve.utils.atomic_io import temporary_prefix
from sleb_serve.utils.outputs import locked, remove_leftovers
from sleb_serve.utils.signals import signals_held

_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx|index\.json|ot)|config\.json|\..*"
)
_CHUNK = 1 << 24
_SINGLE = "model.safetensors"
_FOLDERS = ("additional_chat_templates",)
"""Folders that belong to a tokenizer."""


@dataclass(frozen=True)
class Exported:
    """Result of an export.

    Attributes:
        folder: the output folder.
        blocks: number of kept blocks.
        shards: number of weight files.
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
    """One tensor to copy: its new name, its header entry and the location of its bytes.

    ``pieces`` is None to copy all bytes from start to end, or else the (start, end) pieces to copy
    from each run of the given length. ``changed`` supplies replacement bytes of the same length.
    """

    name: str
    dtype: str
    shape: list[int]
    file: Path
    start: int
    end: int
    pieces: tuple[int, tuple[tuple[int, int], ...]] | None = None
    changed: Callable[[], bytes] | None = None

    @property
    def size(self) -> int:
        """Number of bytes to write."""
        return sum(end - start for start, end in self.ranges())

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield runs of bytes in the file, in order."""
        if self.pieces is None:
            yield self.start, self.end
            return
        every, pieces = self.pieces
        for start in range(self.start, self.end, every):
            yield from ((start + first, start + last) for first, last in pieces)


def export(
    model: str | Path,
    manifest: Manifest,
    folder: str | Path,
    *,
    revision: str | None = None,
    for_vllm: bool = True,
    on_shard: Callable[[int, int], None] = lambda number, count: None,
) -> Exported:
    """Write the pruned model to `folder` as a plain checkpoint, completely or not at all.

    Args:
        model: checkpoint folder or hub id of the dense model.
        manifest: the blocks to remove; its repair is merged.
        folder: the output folder; must not exist or be empty.
        revision: of a hub model; None for the manifest's.
        for_vllm: refuse models that stock vLLM would run differently from Transformers.
        on_shard: called after each shard with the number written so far and the total.

    Raises:
        SlebError: the model does not match the manifest or cannot be expressed without these
            blocks, or a file cannot be written.
    """
    folder = Path(folder)
    pruning = manifest.pruning()
    revision = revision_of(str(model), manifest, revision)
    checkpoint = check_model(str(model), pruning, revision, servable=False, fetch=True)
    config = exported_config(checkpoint, pruning.cut, for_vllm=for_vllm)
    shards = _shards(checkpoint, pruning, read_sidecar(pruning))
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
            _write_index(temporary, names, shards)
        for file in sorted(checkpoint.path.iterdir()):
            if file.is_file() and not _WEIGHTS.fullmatch(file.name):
                shutil.copyfile(file, temporary / file.name)
            elif file.name in _FOLDERS and file.is_dir():
                shutil.copytree(file, temporary / file.name)
        for name, content in written_quantisation(checkpoint, pruning.cut).items():
            _write_json(temporary / name, content)
        manifest.write(temporary / MANIFEST_NAME)
        _write_json(temporary / "config.json", config)
    size = _size(shards)
    return Exported(folder, pruning.num_kept, len(shards), size, sum(sizes or ()))


def _size(shards: Sequence[Sequence[_Piece]]) -> int:
    return sum(piece.size for shard in shards for piece in shard)


def _write_index(folder: Path, names: Sequence[str], shards: Sequence[Sequence[_Piece]]) -> None:
    """Map tensors to shards."""
    places = {
        piece.name: name for name, shard in zip(names, shards, strict=True) for piece in shard
    }
    total = {"total_size": _size(shards)}
    index = {"metadata": total, "weight_map": dict(sorted(places.items()))}
    _write_json(folder / f"{_SINGLE}.index.json", index)


def _shards(checkpoint: Checkpoint, pruning: Pruning, changes: WeightChanges) -> list[list[_Piece]]:
    """Plan the content of each output shard from the source's shards.

    Raises:
        SlebError: the weights are not safetensors, or the repair does not match them.
    """
    cut, prefix = pruning.cut, checkpoint.layer_prefix
    shards, left = [], set(changes.names)
    for file in checkpoint.weight_files(frozenset(pruning.removed)):
        pieces = []
        for name, (dtype, shape, start, end) in tensors_of(file).items():
            new_name = cut.name(name, prefix)
            if new_name is None:
                continue
            piece = _Piece(new_name, dtype, shape, file, start, end)
            if name in left:
                left.remove(name)
                piece = replace(piece, changed=partial(_changed, file, name, changes))
            pieces.append(_sliced(piece, name, cut))
        if pieces:
            shards.append(pieces)
    if left:
        raise SlebError(
            f"the repair holds {', '.join(sorted(left))}, which the checkpoint does not have; make "
            "the repair again"
        )
    return shards


def _changed(file: Path, name: str, changes: WeightChanges) -> bytes:
    """Return the bytes of a repaired weight."""
    import torch
    from safetensors import safe_open

    with safe_open(file, "pt") as source:
        old = source.get_tensor(name)
    new = changes(name, old)
    if (new.dtype, new.shape) != (old.dtype, old.shape):
        raise SlebError(
            f"the repair of {name} is {new.dtype} {list(new.shape)}, the checkpoint's is "
            f"{old.dtype} {list(old.shape)}; make the repair in the checkpoint's dtype"
        )
    data: bytes = new.contiguous().view(torch.uint8).numpy().tobytes()
    return data


def _sliced(piece: _Piece, name: str, cut: Cut) -> _Piece:
    """Drop the removed layers' parts of a tensor with one part per layer."""
    dimension = cut.parts(name, piece.shape)
    if dimension is None:
        return piece
    shape = list(piece.shape)
    # Bytes of one layer's part, and of all parts that are stored together.
    part = (piece.end - piece.start) // math.prod(shape[:dimension]) // cut.num_blocks
    kept = tuple((place * part, (place + 1) * part) for place in cut.kept)
    shape[dimension] = shape[dimension] // cut.num_blocks * len(cut.kept)
    return replace(piece, shape=shape, pieces=(part * cut.num_blocks, kept))


def _write_shard(path: Path, pieces: Sequence[_Piece]) -> None:
    """Write a safetensors file; see https://github.com/huggingface/safetensors#format."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for piece in pieces:
        end = offset + piece.size
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
                if piece.changed is not None:
                    target.write(piece.changed())
                    continue
                if piece.file not in sources:
                    sources[piece.file] = piece.file.open("rb")
                for start, stop in piece.ranges():
                    _copy(sources[piece.file], start, stop, target)
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
    """Provide a temporary folder that becomes `folder` on success and is deleted on failure.

    Raises:
        SlebError: `folder` is not empty or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SlebError(f"cannot write {folder}: it already exists; give a new folder")
    whole = folder.absolute()
    if not whole.parent.is_dir():
        raise SlebError(f"cannot write {folder}: there is no folder {folder.parent}")
    with locked(whole.with_name(f".{whole.name}.lock"), folder):
        remove_leftovers(whole)
        yield from _filled(folder)


def _filled(folder: Path) -> Iterator[Path]:
    temporary: Path | None = None
    try:
        with signals_held():
            temporary = Path(
                tempfile.mkdtemp(dir=folder.absolute().parent, prefix=temporary_prefix(folder))
            )
        yield temporary
        temporary.chmod(0o755)
        for file in (path for path in temporary.rglob("*") if path.is_file()):
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
        os.replace(temporary, folder)
    except OSError as error:
        raise SlebError(
            f"cannot write {folder}: {first_line(error)}; nothing was left there"
        ) from error
    finally:
        if temporary is not None:
            with signals_held():
                shutil.rmtree(temporary, ignore_errors=True)
