"""Safetensors headers and samples of their bytes."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from sleb_serve.errors import SlebError, first_line
from sleb_serve.utils import strict_json

_HEADER_MAX_BYTES = 100 << 20
"""The safetensors library's own limit."""


_SAMPLES = 4


_SAMPLE_BYTES = 4096


_MAX_SIZE = 1 << 62


_MAX_DIMENSIONS = 64


_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Bytes per element; tensors of other dtypes may have any size."""


Entry = tuple[str, list[int], int, int]
"""A tensor's dtype, shape, start byte and end byte (exclusive)."""


def tensors_of(file: Path) -> Mapping[str, Entry]:
    """Read the tensors of a safetensors file by name; headers are cached.

    The format: https://github.com/huggingface/safetensors#format

    Raises:
        SlebError: it is not a complete safetensors file, or has PyTorch's format.
    """
    if file.suffix != ".safetensors":
        raise SlebError(
            f"{file.parent} has weights in PyTorch's .bin format; save them as safetensors first "
            f"(model.save_pretrained)"
        )
    try:
        found = file.stat()
        return _header(file, found.st_size, found.st_mtime_ns)
    except SlebError as error:
        why = strict_json.without_advice(error)
    except (OSError, struct.error) as error:
        why = first_line(error)
    raise SlebError(f"{file} is not a whole safetensors file: {why}; download the model again")


@functools.lru_cache(maxsize=1024)
def _header(file: Path, size: int, changed: int) -> Mapping[str, Entry]:
    del changed  # only part of the cache key, so that a rewritten file is read again
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > min(_HEADER_MAX_BYTES, size - 8):
            raise SlebError("its header is longer than the file")
        header = strict_json.any_object(strict_json.load(stream.read(length)), "its header")
    header.pop("__metadata__", None)
    first = 8 + length
    entries = {name: _entry(name, entry, first, size) for name, entry in header.items()}
    reached = first
    for _, _, begin, end in sorted(entries.values(), key=lambda entry: entry[2:]):
        if begin != reached:
            raise SlebError("its tensors overlap, or there are bytes between them")
        reached = end
    if reached != size:
        raise SlebError("there are bytes behind its last tensor")
    return MappingProxyType(entries)


def _entry(name: str, value: object, first: int, size: int) -> Entry:
    """Parse a tensor's header entry in a file of `size` bytes; `first` is the end of the header."""
    name = strict_json.line(name, "a tensor's name")
    where = f"tensor {strict_json.short(name)}"
    keys = ("dtype", "shape", "data_offsets")
    entry = strict_json.object_(value, where, required=keys)
    dtype = strict_json.line(entry["dtype"], f"{where}: dtype")
    shape, offsets = (
        [strict_json.integer(n, f"{where}: {key}", 0, _MAX_SIZE) for n in _list(entry[key], where)]
        for key in keys[1:]
    )
    if len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - first:
        raise SlebError(f"{where} lies outside the file")
    begin, end = offsets
    bits = _BITS.get(dtype)
    if len(shape) > _MAX_DIMENSIONS:
        raise SlebError(f"{where} has {len(shape)} dimensions")
    if bits is not None and math.prod(shape) * bits != (end - begin) * 8:
        raise SlebError(f"{where} has other bytes than its dtype and shape take")
    return dtype, shape, first + begin, first + end


def _list(value: object, where: str) -> list[Any]:
    return strict_json.list_(value, f"{where}: shape and data_offsets each")


def sample(stream: BinaryIO, start: int, end: int, update: Any) -> None:
    """Update a digest with a tensor's bytes, or with four chunks of them."""
    size = end - start
    if size <= _SAMPLES * _SAMPLE_BYTES:
        offsets, length = [0], size
    else:
        length = _SAMPLE_BYTES
        offsets = [i * (size - length) // (_SAMPLES - 1) for i in range(_SAMPLES)]
    for offset in offsets:
        stream.seek(start + offset)
        update(stream.read(length))
