"""A dense checkpoint's tensors on their way into the model with fewer layers.

Nothing here knows vLLM: tensors come as pairs of name and tensor, from whatever reads the files.
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
    """Renames tensors, puts a repair's in their places, and remembers which blocks gave some.

    Args:
        checkpoint: the dense model's files.
        pruning: what goes; its sidecar is read.

    Raises:
        SlebError: the sidecar is missing, or not the manifest's.
    """

    def __init__(self, checkpoint: Checkpoint, pruning: Pruning) -> None:
        self._checkpoint, self._cut = checkpoint, pruning.cut
        self._changes = read_sidecar(pruning)
        self._repair_path = "" if pruning.repair is None else pruning.repair.path
        self._seen: set[int] = set()

    def __call__(self, tensors: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """The shorter model's tensors, of the dense model's; those of removed layers are left out.

        Raises:
            SlebError: a repaired weight is not in the checkpoint in that shape and dtype.
        """
        left = set(self._changes.names)
        for name, tensor in tensors:
            new_name = self._cut.name(name, self._checkpoint.layer_prefix)
            if new_name is None:
                # A reader of whole files cannot pass over it.
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
        """Refuse a checkpoint that had nothing for a layer that stays.

        Raises:
            SlebError: naming the blocks.
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
    """A tensor without the removed layers' parts, where it has a part for each; or itself.

    Args:
        name: as in the dense model.
        tensor: a torch tensor.
        cut: the layers that go.
    """
    dimension = cut.parts(name, tensor.shape)
    if dimension is None:
        return tensor
    import torch

    parts = tensor.unflatten(dimension, (cut.num_blocks, -1))
    kept = torch.tensor(cut.kept, device=tensor.device)
    return parts.index_select(dimension, kept).flatten(dimension, dimension + 1)


class NeededOnly:
    """Opens safetensors files so that tensors of removed layers are not seen.

    A file that holds nothing else is not opened. Files that the manifest's digest does not cover (a
    copy of the weights in a vendor's own format) are not opened either.

    Args:
        checkpoint: the dense model's files.
        pruning: what goes.
        safe_open: safetensors' own.
    """

    def __init__(
        self, checkpoint: Checkpoint, pruning: Pruning, safe_open: Callable[..., Any]
    ) -> None:
        self._checkpoint, self._open = checkpoint, safe_open
        self._removed = frozenset(pruning.removed)

    def __call__(self, file: Any, *args: Any, **kwargs: Any) -> Any:
        """Like `safe_open`."""
        if Path(file).name not in self._needed:
            return _File(None, self.is_needed)
        return _File(self._open(file, *args, **kwargs), self.is_needed)

    @property
    def leaves_files_out(self) -> bool:
        """Whether some of the files that an index of safetensors names are not needed."""
        return any(
            name.endswith(".safetensors") for name in self._checkpoint.unneeded_files(self._removed)
        )

    def is_needed(self, name: str) -> bool:
        """Whether a tensor is of a layer that stays, or of none."""
        return self._checkpoint.block_of(name) not in self._removed

    # Only when the first file is opened: a model from the hub is on this machine only then.
    @functools.cached_property
    def _needed(self) -> frozenset[str]:
        return frozenset(file.name for file in self._checkpoint.weight_files(self._removed))


class _File:
    """A safetensors file of which some tensors are seen; of no file, none."""

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
