"""The files of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sleb_serve.checkpoint.safetensors import tensors_of
from sleb_serve.errors import SlebError, first_line
from sleb_serve.utils import strict_json
from sleb_serve.utils.limited import read_limited

WEIGHT_FILES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


_CONFIG_MAX_BYTES = 16 << 20
_INDEX_MAX_BYTES = 100 << 20
"""Enough for a file name for each of a million tensors."""


def read_json(file: Path, most: int = _CONFIG_MAX_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file of a checkpoint.

    Raises:
        SlebError: it cannot be read, is larger than `most` bytes, or is not an object.
    """
    try:
        value = strict_json.load(read_limited(file, most), of_others=True)
        return strict_json.any_object(value, "it")
    except OSError as error:
        why = first_line(error)
    except SlebError as error:
        why = strict_json.without_advice(error)
    raise SlebError(f"cannot read {file}: {why}; download the model again")


def names_in(file: Path) -> list[str]:
    """Return the tensor names in a file of either format.

    Raises:
        SlebError: it cannot be read.
    """
    if file.suffix == ".safetensors":
        return list(tensors_of(file))
    import torch

    try:
        weights = torch.load(file, map_location="meta", mmap=True, weights_only=True)
    except Exception as error:
        raise SlebError(
            f"cannot read {file}: {first_line(error)}; download the model again"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise SlebError(f"{file} holds no weights by name; download the model again")
    return list(weights)


def weight_map_of(index: Path) -> dict[str, str]:
    """Read the file of each tensor from an index of shards.

    Raises:
        SlebError: it cannot be read, or an entry is not a tensor or not a file in the same folder.
    """
    try:
        found = read_json(index, _INDEX_MAX_BYTES).get("weight_map")
        weight_map = strict_json.any_object(found, "weight_map")
        for name in weight_map:
            strict_json.line(name, "a tensor's name")
        for name in set(map(_file_name, weight_map.values())):
            if Path(name).name != name:
                raise SlebError(f"{strict_json.short(name)} is no file beside it")
    except SlebError as error:
        why = strict_json.without_advice(error)
        prefix = "" if str(index) in why else f"{index} does not name shard files: "
        raise SlebError(f"{prefix}{why}; download the model again") from error
    if not weight_map:
        raise SlebError(f"{index} does not name shard files; download the model again")
    return weight_map


def _file_name(value: object) -> str:
    return strict_json.line(value, "the name of a shard")
