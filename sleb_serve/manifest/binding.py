"""Binding of manifests to models; see `sleb_serve.manifest.schema.ModelBinding`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.checkpoint.full_digest import Reading, not_told
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


def bind(
    model: str, checkpoint: Checkpoint, *, full: bool = False, reading: Reading = not_told
) -> ModelBinding:
    """The binding of a manifest to a checkpoint whose files are on this machine.

    Args:
        model: its folder or hub id.
        checkpoint: its files.
        full: read all of the weights for their full digest, too.
        reading: told how far that is, in bytes.

    Raises:
        SlebError: weights are missing, or a file is cut short.
    """
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
        full_sha256=checkpoint.full_sha256(reading=reading) if full else None,
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


def compare_full(
    model: str, checkpoint: Checkpoint, expected: Sequence[str | None], reading: Reading = not_told
) -> None:
    """Refuse weights that differ in any byte from the manifest's.

    Args:
        model: folder or hub id, for the message.
        checkpoint: its files, of which all are read that hold what is compared.
        expected: the full digest of what lies outside the blocks, then of each block; None for
            blocks that are not to be read.
        reading: told how far it is, in bytes.

    Raises:
        SlebError: naming the first part that differs; or weights are missing or cut short.
    """
    unread = frozenset(block for block, part in enumerate(expected, -1) if part is None)
    found = checkpoint.full_sha256(unread, reading)
    if found is None:
        raise SlebError(
            f"{model} has weights in PyTorch's .bin format, which has no full digest; save them as "
            f"safetensors (model.save_pretrained) and make the manifest again"
        )
    pairs = enumerate(zip(expected, found, strict=True), -1)
    others = [block for block, (wanted, there) in pairs if wanted not in (None, there)]
    if others:
        names = ["what lies outside the blocks" if b < 0 else f"block {b}" for b in others]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise SlebError(
            f"the weights of {model} are not those that the manifest was made on: the full digest "
            f"of {names[0]}{more} differs, though quick ones may agree; restore the files or "
            f"download the model again, or re-run `sleb-serve select` for it"
        )


def compare_loaded(
    model: str, checkpoint: Checkpoint, pruning: Pruning, note: Callable[[str], None]
) -> None:
    """Refuse weights that a server has read and that are not the manifest's, as it asks for.

    Args:
        model: folder or hub id.
        checkpoint: its files, which are on this machine by now.
        pruning: the manifest's content; with full digests, all bytes of kept blocks are compared.
        note: told what is compared.

    Raises:
        SlebError: naming what differs.
    """
    found = checkpoint.weights_sha256(pruning.known_sha256)
    pruning.check_binding(model, weights_sha256=found)
    if pruning.full_sha256:
        note("Comparing all bytes of the weights with the manifest's full digests")
        compare_full(model, checkpoint, _of_kept(pruning))
    note(f"Weights compared with the manifest: {pruning.compared} digest, {found[:16]}")


def check_readable(
    pruning: Pruning, reader: str, strategy: str | None, extra: Mapping[str, Any]
) -> None:
    """Refuse to compare all bytes where vLLM would read others than are compared.

    Args:
        pruning: the manifest's content.
        reader: the load format that reads the files.
        strategy: vLLM's ``--safetensors-load-strategy``.
        extra: what the reader is configured with.

    Raises:
        SlebError: it does not read tensors one by one, of the checkpoint's own files alone.
    """
    if not pruning.full_sha256:
        return
    for option, given, known in (
        ("--load-format", reader, ("hf", "safetensors")),
        ("--safetensors-load-strategy", strategy, (None, "lazy", "prefetch")),
        ("enable_multithread_load", bool(extra.get("enable_multithread_load")), (False,)),
    ):
        if given not in known:
            raise SlebError(
                f"{option} {given} may read other bytes than --sleb-verify full compares; omit one "
                "of them"
            )


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
    if pruning.full_sha256:
        compare_full(model, checkpoint, _of_kept(pruning))


def _of_kept(pruning: Pruning) -> list[str | None]:
    """Full digests as `compare_full` takes them, without those of removed blocks."""
    parts = iter(pruning.full_sha256)
    removed = frozenset(pruning.removed)
    return [None if block in removed else next(parts) for block in range(-1, pruning.num_blocks)]
