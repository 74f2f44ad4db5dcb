"""Loading a checkpoint: removed layers are not read, a repair's weights take their places."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from vllm.model_executor.model_loader import weight_utils

from sleb_serve.checkpoint import Checkpoint
from sleb_serve.errors import SlebError
from sleb_serve.pruning import Pruning
from sleb_serve.sidecar import gap_name
from sleb_vllm.patching import replaced


def folded(
    weights: Iterable[tuple[str, Any]], repair: Mapping[str, Any], path: str
) -> Iterator[tuple[str, Any]]:
    """A checkpoint's weights, with those of a folded repair in the place of its own.

    Whatever the model does with a weight then (renaming, fusing, splitting over ranks), it does
    with the repaired one.

    Raises:
        SlebError: a repaired weight is not in the checkpoint in that shape and dtype.
    """
    left = set(repair)
    for name, tensor in weights:
        mended = repair.get(name)
        if mended is not None:
            if mended.shape != tensor.shape or mended.dtype != tensor.dtype:
                raise SlebError(
                    f"the repair {path} has {name} as {mended.dtype} {list(mended.shape)}, the "
                    f"checkpoint as {tensor.dtype} {list(tensor.shape)}; select with --repair anew"
                )
            left.discard(name)
        yield name, tensor if mended is None else mended
    if left:
        raise SlebError(
            f"the repair {path} has weights that the checkpoint did not give: "
            f"{', '.join(sorted(left))}; select with --repair anew"
        )


def fill_gaps(layers: nn.ModuleList, pruning: Pruning, repair: Mapping[str, Any]) -> None:
    """Give the gaps of this rank what repairs them, once the model is loaded."""
    for first, _ in pruning.gaps:
        buffer = getattr(layers[first], "repair", None)
        if buffer is not None:
            value = repair[gap_name(first)]
            buffer.copy_(value if buffer.ndim == 2 else value - 1)


@contextmanager
def removed_weights_skipped(checkpoint: Checkpoint, pruning: Pruning) -> Iterator[None]:
    """While this is open, vLLM's safetensors readers pass over removed layers.

    A tensor of a removed layer is not read; a shard that holds nothing else is not opened and need
    not even be there. Files that the manifest's digest does not cover (a second copy of the
    weights in a vendor's own format) are not opened either.
    """
    removed = frozenset(pruning.removed)
    should_skip = weight_utils.should_skip_weight
    filter_files = weight_utils.filter_duplicate_safetensors_files

    def should_skip_weight(name: str, *args: Any, **kwargs: Any) -> bool:
        return checkpoint.block_of(name) in removed or bool(should_skip(name, *args, **kwargs))

    def filter_duplicate_safetensors_files(
        files: list[str], folder: str, *args: Any, **kwargs: Any
    ) -> list[str]:
        # Only now, since a model from the hub is on this machine only now.
        needed = {file.name for file in checkpoint.weight_files(without=removed)}
        return [file for file in files if Path(file).name in needed]

    with (
        replaced("should_skip_weight", should_skip, should_skip_weight),
        replaced(
            "filter_duplicate_safetensors_files", filter_files, filter_duplicate_safetensors_files
        ),
    ):
        yield
