"""The files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sleb_serve.checkpoint.safetensors import tensors_of
from sleb_serve.errors import SlebError, first_line

WEIGHT_FILES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


def read_json(file: Path) -> Any:
    """A JSON file of a checkpoint.

    Raises:
        SlebError: it cannot be read.
    """
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SlebError(
            f"cannot read {file}: {first_line(error)}; download the model again"
        ) from error


def names_in(file: Path) -> list[str]:
    """Names of the tensors in a file, of either format.

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
    return list(weights)


def weight_map_of(index: Path) -> dict[str, str]:
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
