"""What binds a manifest to a model: see `sleb_serve.manifest.schema.ModelBinding`."""

from __future__ import annotations

from pathlib import Path

from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.manifest.pruning import Pruning
from sleb_serve.manifest.schema import ModelBinding


def check_config_binding(checkpoint: Checkpoint, model: str, pruning: Pruning) -> None:
    """Refuse a model that is not the manifest's, by its config alone.

    Raises:
        SlebError: naming what was expected and what was found.
    """
    pruning.check_binding(
        model,
        architecture=checkpoint.architecture,
        num_blocks=checkpoint.num_blocks,
        config_sha256=checkpoint.config_sha256(),
    )


def bind(model: str, checkpoint: Checkpoint) -> ModelBinding:
    """The binding of a manifest to a checkpoint whose files are on this machine."""
    local = Path(model).is_dir()
    leaves = checkpoint.block_sha256()
    known = {} if leaves is None else dict(enumerate(leaves[1:]))
    return ModelBinding(
        # A folder's name, not its path: manifests travel, and paths name people and machines.
        id=checkpoint.path.resolve().name if local else model,
        # The cache keeps a hub model in a folder named by its commit.
        revision=None if local else checkpoint.path.name,
        architecture=checkpoint.architecture,
        num_blocks=checkpoint.num_blocks,
        config_sha256=checkpoint.config_sha256(),
        weights_sha256=checkpoint.weights_sha256(known),
        block_sha256=None if leaves is None else leaves[1:],
    )
