"""Headers of safetensors files, and samples of their bytes."""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from sleb_serve.errors import SlebError, first_line

_HEADER_MAX_BYTES = 100 << 20
"""The limit of the safetensors library itself."""


_SAMPLES = 4


_SAMPLE_BYTES = 4096


Entry = tuple[str, list[int], int, int]
"""A tensor's dtype, shape, first byte, and the byte after its last."""


def tensors_of(file: Path) -> Mapping[str, Entry]:
    """The tensors of a safetensors file by name; a file's header is read once.

    The format: https://github.com/huggingface/safetensors#format

    Raises:
        SlebError: it is not a whole safetensors file.
    """
    try:
        found = file.stat()
        return _header(file, found.st_size, found.st_mtime_ns)
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SlebError(
            f"{file} is not a whole safetensors file: {first_line(error)}; download the model again"
        ) from error


@functools.lru_cache(maxsize=1024)
def _header(file: Path, size: int, changed: int) -> Mapping[str, Entry]:
    del changed  # a part of the key alone: a file that was written again is read again
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > min(_HEADER_MAX_BYTES, size):
            raise ValueError("its header is longer than the file")
        header = json.loads(stream.read(length))
    entries: dict[str, Entry] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end <= size - 8 - length:
            raise ValueError(f"tensor {name} lies outside the file")
        entries[name] = (entry["dtype"], entry["shape"], 8 + length + begin, 8 + length + end)
    return MappingProxyType(entries)


def sample(stream: BinaryIO, start: int, end: int, update: Any) -> None:
    """Feed a tensor's bytes, or four chunks of them, to a digest."""
    size = end - start
    if size <= _SAMPLES * _SAMPLE_BYTES:
        offsets, length = [0], size
    else:
        length = _SAMPLE_BYTES
        offsets = [i * (size - length) // (_SAMPLES - 1) for i in range(_SAMPLES)]
    for offset in offsets:
        stream.seek(start + offset)
        update(stream.read(length))
