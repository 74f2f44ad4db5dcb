"""Binding of manifests to models; see `sleb_serve.manifest.schema.ModelBinding`."""

from __future__ import annotations

from pathlib import Path

from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.checkpoint.hub import download_weights, open_checkpoint
from sleb_serve.compat.architectures import check_supported
from sleb_serve.errors import SlebError
from sleb_serve.manifest.pruning import Pruning
from sleb_serve.manifest.repair_file import check_sidecar
from sleb_serve.manifest.schema import Manifest, ModelBinding


def check_config_binding(checkpoint: Checkpoint, model: str, pruning: Pruning) -> None:
    """Refuse a model that does not match the manifest, by its config alone.

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
    """Return the binding of a manifest to a local checkpoint."""
    local = Path(model).is_dir()
    leaves = checkpoint.block_sha256()
    known = {} if leaves is None else dict(enumerate(leaves[1:]))
    return ModelBinding(
        # Store a folder's name, not its path, which may contain names of people and machines.
        id=checkpoint.path.resolve().name if local else model,
        # The cache stores a hub model in a folder named after its commit.
        revision=None if local else checkpoint.path.name,
        architecture=checkpoint.architecture,
        num_blocks=checkpoint.num_blocks,
        config_sha256=checkpoint.config_sha256(),
        weights_sha256=checkpoint.weights_sha256(known),
        block_sha256=None if leaves is None else leaves[1:],
    )


def revision_of(model: str, manifest: Manifest, given: str | None) -> str | None:
    """Return the given revision of a hub model, or else the manifest's."""
    if given is not None or Path(model).is_dir() or model != manifest.model.id:
        return given
    return manifest.model.revision


def check_model(
    model: str,
    pruning: Pruning,
    revision: str | None = None,
    servable: bool = True,
    fetch: bool = False,
) -> Checkpoint:
    """Refuse a model that does not match the manifest or, if `servable`, cannot be served.

    Args:
        model: folder or hub id.
        pruning: the manifest's content.
        revision: of a hub model; None for its default branch.
        servable: whether the plugin is to serve it.
        fetch: download a hub model's weights first. Otherwise the plugin compares missing weights
            once vLLM has downloaded them.

    Raises:
        SlebError: naming what was expected and what was found.
    """
    if fetch:
        download_weights(model, revision)
    checkpoint = open_checkpoint(model, revision)
    check_config_binding(checkpoint, model, pruning)
    compare_weights(model, checkpoint, pruning)
    if servable:
        check_supported(pruning.architecture)
    if pruning.repair is not None:
        check_sidecar(pruning.repair)
    return checkpoint


def compare_weights(model: str, checkpoint: Checkpoint, pruning: Pruning) -> bool:
    """Refuse weights that do not match the manifest.

    Returns:
        Whether they were compared; False if a hub model's weights are not on this machine.

    Raises:
        SlebError: they differ, or some are missing from a folder.
    """
    known = pruning.known_sha256
    try:
        checkpoint.weight_files(frozenset(known))
    except SlebError:
        if Path(model).is_dir():
            raise
        return False
    pruning.check_binding(model, weights_sha256=checkpoint.weights_sha256(known))
    return True
