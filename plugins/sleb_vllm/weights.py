"""Loading a checkpoint without reading what belongs to its removed layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm.model_executor.model_loader import weight_utils

from sleb_serve.checkpoint import Checkpoint
from sleb_serve.pruning import Pruning
from sleb_vllm.patching import replaced


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
