"""What binds a manifest to a model: see `sleb_serve.manifest.schema.ModelBinding`."""

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


def revision_of(model: str, manifest: Manifest, given: str | None) -> str | None:
    """The revision of a hub model: the one that is given, or else the manifest's own."""
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
    """Refuse a model that is not the manifest's, or if `servable`, that the plugin cannot serve.

    Args:
        model: folder or hub id.
        pruning: the manifest's content.
        revision: of a hub model; None for its default branch.
        servable: whether the plugin is to serve it.
        fetch: bring a hub model's weights to this machine first. Without, weights that are not
            here are left to the plugin, which compares them once vLLM has fetched them.

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
    """Refuse weights that are not the manifest's.

    Returns:
        Whether they were compared; not where a hub model's are not on this machine.

    Raises:
        SlebError: they are others, or a folder lacks some.
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


def check_again(checkpoint: Checkpoint, model: str, pruning: Pruning) -> None:
    """Refuse what is to be loaded into a pruned model that runs, unless it is the manifest's.

    Raises:
        SlebError: it is another model, or its weights are not here to be compared.
    """
    check_config_binding(checkpoint, model, pruning)
    if not compare_weights(model, checkpoint, pruning):
        raise SlebError(
            f"the weights of {model} are not on this machine, so they cannot be compared with the "
            f"manifest before they are loaded; restart the server"
        )
