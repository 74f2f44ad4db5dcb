"""Healing from end to end: a model, a manifest and text in, a repaired manifest out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.cut.servable import check_servable
from sleb_serve.data.tokenizer import load_tokenizer, sequence_length
from sleb_serve.data.training import Mixture, make_mixture
from sleb_serve.errors import SlebError
from sleb_serve.healing.config import DEFAULT_LENGTH, HealConfig, Progress
from sleb_serve.manifest.binding import check_model, revision_of
from sleb_serve.manifest.reader import MANIFEST
from sleb_serve.manifest.repair_file import SIDECAR, check_sidecar, sidecar_path
from sleb_serve.manifest.schema import Manifest
from sleb_serve.utils.atomic_io import check_writable, is_stream
from sleb_serve.utils.distributed import Ranks, launched
from sleb_serve.utils.outputs import Output, beginning_with, claimed

_STATE = beginning_with("the state of a healing", rb"PK\x03\x04")
_MOST_TOKENS = 20_000_000
"""Tokens to read if only time ends the training; the texts then repeat."""


@dataclass(frozen=True)
class Work:
    """One validated healing: the data shared by all numbers of removals.

    The manifest has no repair; `start` has the initial updates by number of removals.
    """

    checkpoint: Checkpoint
    manifest: Manifest
    start: Mapping[int, Manifest]
    config: HealConfig
    output: Path
    mixture: Mixture
    ranks: Ranks
    resume: bool
    progress: Progress


def heal(
    model: str | Path,
    manifest: Manifest,
    config: HealConfig,
    output: str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Train a pruned model to predict what the dense model predicts.

    Args:
        model: checkpoint folder or hub id of the dense model.
        manifest: the blocks to remove. The result drops its other repairs, except those that
            `config.further` continues from.
        config: the training options.
        output: where to write the healed manifest; the updates go next to it.
        resume: continue an interrupted healing for `output`.
        force: replace an existing `output`, even of another kind.
        progress: receives progress events.

    Returns:
        The manifest with its repairs.

    Raises:
        SlebError: the request cannot be fulfilled; at most the state for resuming was written.
    """
    config.check()
    output = Path(output)
    if is_stream(output):
        raise SlebError(f"cannot write {output}: what is learned lies beside it; give a file")
    with claimed(_outputs(manifest, config, output), force=force):
        work = _prepared(str(model), manifest, config, output, resume, progress or Progress())
        from sleb_serve.healing.run import run

        return run(work)


def state_path(output: Path, blocks: int) -> Path:
    """Return the path of the resume state for `output` and this number of removals."""
    return output.with_name(f"{output.name}.heal-{blocks}.state")


def _outputs(manifest: Manifest, config: HealConfig, output: Path) -> list[Output]:
    """List the output files."""
    check_writable(output)
    whole = len(manifest.removed)
    counts = sorted({*config.also, whole})
    sidecars = [sidecar_path(output, None if blocks == whole else blocks) for blocks in counts]
    return [
        (output, MANIFEST),
        *((path, SIDECAR) for path in sidecars),
        *((state_path(output, blocks), _STATE) for blocks in counts),
    ]


def _prepared(
    model: str,
    manifest: Manifest,
    config: HealConfig,
    output: Path,
    resume: bool,
    progress: Progress,
) -> Work:
    """Refuse invalid requests before the model is loaded."""
    from sleb_serve.models.loading import generates

    start = _start(manifest, config, output) if config.further else {}
    # A fold would also change the teacher's weights.
    manifest = replace(manifest, repairs=())
    for blocks in config.also:
        manifest.prefix(blocks)
    pruning = manifest.pruning()
    revision = revision_of(model, manifest, config.revision)
    checkpoint = check_model(model, pruning, revision, servable=False, fetch=True)
    checkpoint.check_layers()
    check_servable(checkpoint, pruning.cut)
    if checkpoint.is_quantised():
        raise SlebError(
            f"{checkpoint.path} is quantised, and a change of its weights would be lost in them; "
            f"heal the model that it was made from, and quantise what `export` writes"
        )
    if not generates(checkpoint):
        raise SlebError(
            f"{checkpoint.architecture} does not predict tokens, so it cannot be healed"
        )
    ranks = launched()
    if config.batch_size < ranks.count:
        raise SlebError(
            f"batch_size={config.batch_size}: {ranks.count} processes share a step, and each needs "
            f"a sequence; give a larger `batch_size`, or launch fewer"
        )
    mixture = _mixture(checkpoint, config)
    return Work(checkpoint, manifest, start, config, output, mixture, ranks, resume, progress)


def _start(manifest: Manifest, config: HealConfig, output: Path) -> Mapping[int, Manifest]:
    """Read the updates of an earlier healing, for each number of removals."""
    found = {}
    for blocks in {*config.also, len(manifest.removed)}:
        part = manifest.prefix(blocks)
        pruning = part.pruning()
        if part.repair is None or part.repair.kind != "heal" or pruning.repair is None:
            raise SlebError(
                f"further=True: {blocks} removals of this manifest are not healed yet; heal them "
                f"without `further`"
            )
        if Path(pruning.repair.path).resolve().parent == output.resolve().parent and (
            part.repair.file.startswith(f"{output.name}.")
        ):
            raise SlebError(
                f"{output} is the input of `further`, so it must be kept; give another `output`"
            )
        check_sidecar(pruning.repair)
        found[blocks] = part
    return found


def _mixture(checkpoint: Checkpoint, config: HealConfig) -> Mixture:
    length = sequence_length(checkpoint, config.sequence_length, DEFAULT_LENGTH)
    most = -(-(config.budget or _MOST_TOKENS) // length)
    return make_mixture(
        config.texts,
        load_tokenizer(checkpoint),
        length=length,
        most=most,
        held_out=config.held_out,
        seed=config.seed,
    )
