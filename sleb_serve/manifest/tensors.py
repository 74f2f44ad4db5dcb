"""Mapping of a dense checkpoint's tensors to the model with fewer layers.

Independent of vLLM: any reader can supply the (name, tensor) pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.cut.config import Cut
from sleb_serve.errors import SlebError
from sleb_serve.manifest.pruning import Pruning
from sleb_serve.manifest.repair_file import read_sidecar


class ShorterTensors:
    """Renames tensors, applies a repair, and records which blocks had tensors.

    Args:
        checkpoint: the dense model's files.
        pruning: the removed blocks; its sidecar is read.

    Raises:
        SlebError: the sidecar is missing or does not match the manifest.
    """

    def __init__(self, checkpoint: Checkpoint, pruning: Pruning) -> None:
        self._checkpoint, self._cut = checkpoint, pruning.cut
        self._changes = read_sidecar(pruning)
        self._repair_path = "" if pruning.repair is None else pruning.repair.path
        self._seen: set[int] = set()

    def __call__(self, tensors: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Map the dense model's tensors to the shorter model's, without those of removed layers.

        Raises:
            SlebError: a repaired weight does not match the checkpoint in shape or dtype, or is
                missing.
        """
        left = set(self._changes.names)
        for name, tensor in tensors:
            new_name = self._cut.name(name, self._checkpoint.layer_prefix)
            if new_name is None:
                # A reader of whole files cannot skip it.
                continue
            block = self._checkpoint.block_of(name)
            if block is not None:
                self._seen.add(block)
            left.discard(name)
            yield new_name, kept_parts(name, self._repaired(name, tensor), self._cut)
        if left:
            raise SlebError(
                f"the repair {self._repair_path} has weights that the checkpoint did not give: "
                f"{', '.join(sorted(left))}; make the repair again"
            )

    def check(self) -> None:
        """Refuse a checkpoint without tensors for a kept layer.

        Raises:
            SlebError: names the blocks.
        """
        missing = sorted(set(self._cut.kept) - self._seen)
        if missing:
            raise SlebError(
                f"the checkpoint gave no tensor of blocks {missing}; is a shard missing from "
                f"{self._checkpoint.path}?"
            )

    def _repaired(self, name: str, tensor: Any) -> Any:
        repaired = self._changes(name, tensor)
        if (repaired.shape, repaired.dtype) != (tensor.shape, tensor.dtype):
            raise SlebError(
                f"the repair {self._repair_path} has {name} as {repaired.dtype} "
                f"{list(repaired.shape)}, the checkpoint as {tensor.dtype} {list(tensor.shape)}; "
                f"make the repair again"
            )
        return repaired


def kept_parts(name: str, tensor: Any, cut: Cut) -> Any:
    """Drop the removed layers' parts of a tensor with one part per layer; return others as is.

    Args:
        name: as in the dense model.
        tensor: a torch tensor.
        cut: the removed layers.
    """
    dimension = cut.parts(name, tensor.shape)
    if dimension is None:
        return tensor
    import torch

    parts = tensor.unflatten(dimension, (cut.num_blocks, -1))
    kept = torch.tensor(cut.kept, device=tensor.device)
    return parts.index_select(dimension, kept).flatten(dimension, dimension + 1)


class NeededOnly:
    """Opens safetensors files and hides tensors of removed layers.

    Files with only removed layers are not opened, nor are files outside the manifest's digest (a
    copy of the weights in a vendor's own format).

    Args:
        checkpoint: the dense model's files.
        pruning: the removed blocks.
        safe_open: safetensors' own function.
    """

    def __init__(
        self, checkpoint: Checkpoint, pruning: Pruning, safe_open: Callable[..., Any]
    ) -> None:
        self._checkpoint, self._open = checkpoint, safe_open
        self._removed = frozenset(pruning.removed)

    def __call__(self, file: Any, *args: Any, **kwargs: Any) -> Any:
        """Open a file like `safe_open`."""
        if Path(file).name not in self._needed:
            return _File(None, self.is_needed)
        return _File(self._open(file, *args, **kwargs), self.is_needed)

    @property
    def leaves_files_out(self) -> bool:
        """Return whether some files of a safetensors index are not needed."""
        return any(
            name.endswith(".safetensors") for name in self._checkpoint.unneeded_files(self._removed)
        )

    def is_needed(self, name: str) -> bool:
        """Return whether a tensor belongs to a kept layer or to no layer."""
        return self._checkpoint.block_of(name) not in self._removed

    # Only when the first file is opened, because a hub model may not be downloaded earlier.
    @functools.cached_property
    def _needed(self) -> frozenset[str]:
        return frozenset(file.name for file in self._checkpoint.weight_files(self._removed))


class _File:
    """A safetensors file with some tensors visible; empty without a file."""

    def __init__(self, file: Any, is_needed: Callable[[str], bool]) -> None:
        self._file, self._is_needed = file, is_needed

    def __enter__(self) -> _File:
        if self._file is not None:
            self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def keys(self) -> list[str]:
        names = [] if self._file is None else self._file.keys()
        return [name for name in names if self._is_needed(name)]
