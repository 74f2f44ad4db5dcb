"""Selection from end to end: a model and a text in, a manifest out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleb_serve import __version__
from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.checkpoint.hub import download_weights, open_checkpoint
from sleb_serve.cut.servable import check_servable
from sleb_serve.cut.whole import removable
from sleb_serve.data.calibration import Sequences, make_sequences
from sleb_serve.data.tokenizer import load_tokenizer, sequence_length
from sleb_serve.errors import SlebError
from sleb_serve.manifest.binding import bind
from sleb_serve.manifest.reader import MANIFEST
from sleb_serve.manifest.repair_file import SIDECAR, WeightChanges, sidecar_path, write_sidecar
from sleb_serve.manifest.schema import Manifest, Removal, Repair
from sleb_serve.roofline.sizes import read_model
from sleb_serve.roofline.target import blocks_for
from sleb_serve.selection.config import Progress, SelectConfig
from sleb_serve.selection.log import LOG, log_path
from sleb_serve.selection.search import blocks_to_remove, candidates
from sleb_serve.utils.atomic_io import check_writable, is_stream
from sleb_serve.utils.distributed import launched
from sleb_serve.utils.outputs import Output, claimed

if TYPE_CHECKING:
    from sleb_serve.selection.run import Search, Task


@dataclass(frozen=True)
class _Texts:
    """The samples for the searches, and the text for the repair."""

    samples: tuple[Sequences, ...]
    repair: Sequences


def select(
    model: str | Path,
    config: SelectConfig,
    output: str | Path | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Find the blocks whose removal raises the calibration loss least.

    Args:
        model: checkpoint folder or hub id.
        config: the search options.
        output: where to write the manifest; the search log and a repair's weights go next to it.
            None writes nothing and allows no repair.
        resume: continue an interrupted search for `output`.
        force: replace an existing `output`, even of another kind.
        progress: receives progress events.

    Raises:
        SlebError: the request cannot be fulfilled; at most the log of the finished steps was
            written.
    """
    config.check()
    output = None if output is None else Path(output)
    with claimed(_outputs(config, output), force=force):
        return _selected(str(model), config, output, resume, progress or Progress())


def _outputs(config: SelectConfig, output: Path | None) -> list[Output]:
    """List the output files."""
    if output is None or is_stream(output):
        return [] if output is None else [(output, MANIFEST)]
    check_writable(output)
    logs = [(log_path(output, sample), LOG) for sample in range(config.seeds)]
    repair = [] if config.repair == "none" else [(sidecar_path(output), SIDECAR)]
    return [(output, MANIFEST), *logs, *repair]


def _selected(
    model: str, config: SelectConfig, output: Path | None, resume: bool, progress: Progress
) -> Manifest:
    from sleb_serve.selection.run import Search

    beside = None if output is None or is_stream(output) else output
    task = _task(model, config, output, resume, progress)
    texts = _texts(task.checkpoint, config)
    # All that can be refused without reading the weights has been.
    binding = bind(model, task.checkpoint, full=True, reading=progress.reading)
    task = replace(task, binding=binding)

    def search(sample: int) -> Search:
        log = None if beside is None else log_path(beside, sample)
        return Search(task, texts.samples[sample], log, progress)

    found = search(0)
    manifest = _manifest(task, texts, found, output, progress)
    del found  # free its model before loading the next sample's
    others = tuple(
        tuple(choice.block for choice in search(sample).choices)
        for sample in range(1, config.seeds)
    )
    check_servable(task.checkpoint, manifest.pruning().cut)
    if others and manifest.selection is not None:
        manifest = replace(manifest, selection=replace(manifest.selection, samples=others))
    if output is not None and task.ranks.index == 0:
        manifest.write(output)
    return manifest


def _task(
    model: str, config: SelectConfig, output: Path | None, resume: bool, progress: Progress
) -> Task:
    """Find the model and check that the request is possible."""
    from sleb_serve.cut.likeness import transformers_config
    from sleb_serve.selection.run import Task

    if (output is None or is_stream(output)) and (config.repair != "none" or resume):
        raise SlebError("a repair and resuming a search need a file: give `output`")
    checkpoint = open_checkpoint(model, config.revision)
    objective = _objective(checkpoint, config)
    if config.until is not None and objective != "nll":
        raise SlebError(f"`until` is a perplexity, which {checkpoint.architecture} does not have")
    dense = transformers_config(checkpoint.path)
    among = removable(checkpoint.config if dense is None else dense.to_dict())
    early, late = config.early_barrier, config.late_barrier
    most = len(candidates(checkpoint.num_blocks, (), early, late, among))
    count = most
    if config.remove is not None:
        count = blocks_to_remove(config.remove, checkpoint.num_blocks, early, late)
    if config.target is not None:
        count = blocks_for(read_model(str(checkpoint.path)), config.target)
        progress.aimed(config.target, count)
    if count > most:
        asked = config.remove if config.target is None else count
        raise SlebError(
            f"remove={asked}: {most} of the blocks between the barriers can be removed, since "
            "later blocks use the others; ask for fewer"
        )
    download_weights(model, config.revision)
    return Task(
        checkpoint=checkpoint,
        binding=bind(model, checkpoint),
        config=config,
        objective=objective,
        count=count,
        among=among,
        ranks=launched(),
        resume=resume,
    )


def _objective(checkpoint: Checkpoint, config: SelectConfig) -> str:
    from sleb_serve.models.loading import generates
    from sleb_serve.selection.whole_model import EMBEDDING

    predicts = generates(checkpoint)
    objective = config.objective or ("nll" if predicts else EMBEDDING)
    if objective != EMBEDDING and not predicts:
        raise SlebError(
            f"objective={objective} needs token predictions, and {checkpoint.architecture} makes "
            f"none; use objective={EMBEDDING}"
        )
    return objective


def _texts(checkpoint: Checkpoint, config: SelectConfig) -> _Texts:
    """Return the calibration text as sequences of token ids, one sample per search."""
    length = sequence_length(checkpoint, config.sequence_length)
    cut = partial(
        make_sequences,
        str(config.calibration),
        load_tokenizer(checkpoint),
        sequence_length=length,
        seed=config.seed,
    )
    # Read the last sample first, to check that there is enough text.
    samples = [
        cut(sequences=config.sequences, rows=config.rows, sample=sample)
        for sample in reversed(range(config.seeds))
    ][::-1]
    repair = samples[0]
    if config.repair_sequences is not None:
        repair = cut(sequences=config.repair_sequences)
    return _Texts(tuple(samples), repair)


def _manifest(
    task: Task, texts: _Texts, found: Search, output: Path | None, progress: Progress
) -> Manifest:
    """Build the manifest from the first search, and fit and write a repair."""
    from sleb_serve.models.golden import golden

    removed = [choice.block for choice in found.choices]
    repairs: tuple[Repair, ...] = ()
    tensors: dict[str, Any] = {}
    if task.config.repair != "none" and output is not None and task.ranks.index == 0:
        gaps, loss = found.scorer.repair(texts.repair.tokens, removed)
        progress.repaired(gaps, loss)
        tensors = {gap.name: gap.weight for gap in gaps}
        about = {"weights_sha256": task.binding.weights_sha256, "removed": sorted(removed)}
        sidecar = sidecar_path(output)
        digest = write_sidecar(sidecar, tensors, about)
        sequences = texts.repair.calibration.sequences
        repairs = (Repair(task.config.repair, sidecar.name, digest, len(removed), sequences, loss),)
    return Manifest(
        model=task.binding,
        removed=tuple(Removal(choice.block, choice.loss) for choice in found.choices),
        dense_loss=found.dense_loss,
        calibration=texts.samples[0].calibration,
        selection=found.selection,
        repairs=repairs,
        golden=golden(
            found.scorer.model, texts.samples[0].tokens[0], removed, WeightChanges(tensors)
        ),
        created_by={
            "sleb_serve": __version__,
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
    )
