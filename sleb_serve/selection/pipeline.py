"""Selection from end to end: a model and a text in, a manifest out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sleb_serve import __version__
from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.checkpoint.hub import download_weights, open_checkpoint
from sleb_serve.cut.servable import check_servable
from sleb_serve.cut.whole import removable
from sleb_serve.data.calibration import Windows, make_windows
from sleb_serve.data.tokenizer import (
    OFFICIAL_SEQUENCE_LENGTH,
    context_length,
    load_tokenizer,
)
from sleb_serve.errors import SlebError
from sleb_serve.manifest.binding import bind
from sleb_serve.manifest.repair_file import sidecar_path, write_sidecar
from sleb_serve.manifest.schema import Manifest, ModelBinding, Removal, Repair, Selection
from sleb_serve.selection.distributed import launched
from sleb_serve.selection.log import SearchLog, log_path
from sleb_serve.selection.memory import parse_size
from sleb_serve.selection.search import Path as Choices
from sleb_serve.selection.search import (
    Score,
    Scores,
    Step,
    beam,
    blocks_to_remove,
    candidates,
    greedy,
    recorded,
    swap,
)
from sleb_serve.utils.atomic_io import check_writable

if TYPE_CHECKING:
    from sleb_serve.selection.repair import Gap
    from sleb_serve.selection.scorer import Scorer

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""What a model can be scored in; ``auto`` is the checkpoint's own."""

SEARCHES = ("greedy", "fast", "beam:W", "swap")
"""How to search; W is a number."""


@dataclass(frozen=True)
class SelectOptions:
    """What ``sleb-serve select`` was asked for; see its ``--help``."""

    model: str
    output: Path
    remove: str
    revision: str | None = None
    calibration: str = "wikitext2"
    sequences: int | None = None
    sequence_length: int | None = None
    rows: int | None = None
    seed: int = 0
    early_barrier: int = 1
    late_barrier: int = 1
    dtype: str = "auto"
    search: str = "greedy"
    objective: str | None = None
    seeds: int = 1
    repair: str = "none"
    repair_sequences: int | None = None
    repair_search: int = 0
    memory_budget: str | None = None
    resume: bool = False


@dataclass(frozen=True)
class Search:
    """A way to search, as ``--search`` and ``--repair-search`` name it.

    Attributes:
        name: one of `SEARCHES`, without its number.
        width: sets of blocks that a beam follows; 1 for other searches.
        repair: the kind of repair that candidates are judged with, if they are.
        shortlist: candidates a step that are judged as repaired.
    """

    name: str
    width: int = 1
    repair: str | None = None
    shortlist: int = 0

    @property
    def method(self) -> str:
        """What the manifest calls it."""
        if self.repair is not None:
            return f"sleb-{self.repair}:{self.shortlist}"
        width = f":{self.width}" if self.name == "beam" else ""
        return "sleb" if self.name == "greedy" else f"sleb-{self.name}{width}"

    @property
    def exact(self) -> int:
        """How many of a step's least losses it needs exactly."""
        return max(self.width, self.shortlist)

    def run(self, score: Score, **limits: Any) -> Choices:
        """Search; `limits` are the arguments of `greedy`."""
        if self.name == "beam":
            return beam(score, width=self.width, **limits)
        return swap(score, **limits) if self.name == "swap" else greedy(score, **limits)


def parse_search(options: SelectOptions) -> Search:
    """The search that the options ask for.

    Raises:
        SlebError: there is no such search, or it does not go with the other options.
    """
    name, _, number = options.search.partition(":")
    width = int(number) if number.isdecimal() and len(number) < 4 else 0
    if (
        name not in ("greedy", "fast", "beam", "swap")
        or (name == "beam") != (width > 0)
        or (number and name != "beam")
    ):
        raise SlebError(
            f"--search {options.search}: there are {', '.join(SEARCHES)} (beam:4 follows 4 sets)"
        )
    if not options.repair_search:
        return Search(name, max(1, width))
    if options.repair_search < 1 or options.repair == "none":
        raise SlebError(
            "--repair-search N judges the N best blocks of each step as they are once repaired: "
            "give a number and --repair fold"
        )
    if name != "greedy" or options.objective not in (None, "nll"):
        raise SlebError(
            "--repair-search goes with --search greedy and --objective nll only; leave the other "
            "option out"
        )
    return Search(name, 1, options.repair, options.repair_search)


class Progress(Protocol):
    """Told how the search goes."""

    def loaded(self, windows: Windows, resumed: Sequence[Step], how: str) -> None:
        """The model and the text are there; these steps need not be computed again."""

    def step_begins(self, number: int, candidates: int, layers: int) -> None:
        """A step begins: so many candidates, in so many runs of a layer on a window's states."""

    def repairs_begin(self, number: int, candidates: int) -> None:
        """So many candidates of the step are now repaired, one by one."""

    def advance(self) -> None:
        """A layer has been run on the states of one window, or a candidate repaired."""

    def step_ended(self, number: int, step: Step) -> None:
        """A step is finished and logged."""

    def repaired(self, gaps: Sequence[Gap], loss: float) -> None:
        """The gaps were repaired, and this is the calibration loss with that."""


@dataclass(frozen=True)
class _Found:
    """What a search on one sample of the text gave."""

    choices: Choices
    dense_loss: float | None
    scorer: Scorer
    windows: Windows
    selection: Selection


def select(options: SelectOptions, progress: Progress) -> Manifest:
    """Search for the blocks to remove and write the manifest, and beside it the search's log.

    Raises:
        SlebError: what was asked for cannot be done; nothing was written, or nothing more than the
            log of the steps that were finished.
    """
    from sleb_serve.cut.likeness import transformers_config
    from sleb_serve.models.loading import generates
    from sleb_serve.models.pruned import golden
    from sleb_serve.selection.scorer import Scorer
    from sleb_serve.selection.whole_model import EMBEDDING

    search = parse_search(options)
    if options.seeds < 1:
        raise SlebError(f"--seeds {options.seeds}: at least one sample of the text is needed")
    ranks = launched()
    if search.repair is not None and ranks.count > 1:
        raise SlebError("--repair-search is for one process; start it without a launcher")
    checkpoint = open_checkpoint(options.model, options.revision)
    objective = options.objective or ("nll" if generates(checkpoint) else EMBEDDING)
    if objective != EMBEDDING and not generates(checkpoint):
        raise SlebError(
            f"--objective {objective} needs predictions, which {checkpoint.architecture} has not; "
            f"use --objective {EMBEDDING}"
        )
    config = transformers_config(checkpoint.path)
    among = removable(checkpoint.config if config is None else config.to_dict())
    count = blocks_to_remove(
        options.remove, checkpoint.num_blocks, options.early_barrier, options.late_barrier
    )
    most = len(
        candidates(checkpoint.num_blocks, (), options.early_barrier, options.late_barrier, among)
    )
    if count > most:
        raise SlebError(
            f"--remove {options.remove}: {most} of the blocks between the barriers can go, the "
            f"others hold what later blocks use; ask for fewer"
        )
    check_writable(options.output)
    budget = parse_size(options.memory_budget) if options.memory_budget else None
    download_weights(options.model, options.revision)

    cut = partial(
        make_windows,
        options.calibration,
        load_tokenizer(checkpoint),
        sequence_length=options.sequence_length
        or min(OFFICIAL_SEQUENCE_LENGTH, context_length(checkpoint)),
        seed=options.seed,
    )
    samples = [
        cut(sequences=options.sequences, rows=options.rows, sample=sample)
        for sample in reversed(range(options.seeds))  # the last first, to see if there is enough
    ][::-1]
    more_windows = samples[0]
    if options.repair_sequences is not None:
        more_windows = cut(sequences=options.repair_sequences)
    _check_context(checkpoint, samples[0].calibration.sequence_length)
    binding: ModelBinding | None = None

    def search_on(sample: int) -> _Found:
        nonlocal binding
        windows = samples[sample]
        scorer = Scorer(
            checkpoint,
            windows,
            ranks,
            dtype=options.dtype,
            budget=budget,
            steps=count,
            fast=search.name == "fast",
            objective=objective,
            least=search.exact,
        )
        binding = binding or bind(options.model, checkpoint)
        selection = Selection(
            method=search.method,
            early_barrier=options.early_barrier,
            late_barrier=options.late_barrier,
            dtype=scorer.dtype,
            objective=objective,
        )
        log = SearchLog(
            log_path(options.output, sample),
            {
                "model": {**asdict(binding), "id": None, "block_sha256": None},
                "calibration": asdict(windows.calibration),
                "selection": {k: v for k, v in asdict(selection).items() if k != "samples"},
            },
            writes=ranks.index == 0,
        )
        if options.resume:
            log.resume()
        else:
            log.start()
        progress.loaded(windows, log.steps, scorer.how)
        score, dense = _logged(scorer, search, windows, log, progress)
        choices = search.run(
            score,
            num_blocks=checkpoint.num_blocks,
            remove=count,
            early_barrier=options.early_barrier,
            late_barrier=options.late_barrier,
            among=among,
        )
        return _Found(choices, dense(), scorer, windows, selection)

    found = search_on(0)
    assert binding is not None
    removed = [choice.block for choice in found.choices]
    repair, tensors = None, {}
    if options.repair != "none" and ranks.index == 0:
        mended, loss = found.scorer.repair(more_windows.tokens, removed)
        progress.repaired(mended, loss)
        sidecar = sidecar_path(options.output)
        about = {"weights_sha256": binding.weights_sha256, "removed": sorted(removed)}
        tensors = {gap.name: gap.weight for gap in mended}
        digest = write_sidecar(sidecar, tensors, about)
        repair = Repair(
            options.repair, sidecar.name, digest, more_windows.calibration.sequences, loss
        )
    manifest = Manifest(
        model=binding,
        removed=tuple(Removal(choice.block, choice.loss) for choice in found.choices),
        dense_loss=found.dense_loss,
        calibration=found.windows.calibration,
        selection=found.selection,
        repair=repair,
        golden=golden(found.scorer.model, found.windows.tokens[0], removed, tensors),
        created_by={
            "sleb_serve": __version__,
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
    )
    del found  # and its model, before the next sample's is loaded
    others = [
        tuple(choice.block for choice in search_on(sample).choices)
        for sample in range(1, options.seeds)
    ]
    check_servable(checkpoint, manifest.pruning().cut)
    assert manifest.selection is not None
    selection = replace(manifest.selection, samples=tuple(others))
    manifest = replace(manifest, selection=selection)
    if ranks.index == 0:
        manifest.write(options.output)
    return manifest


def _logged(
    scorer: Scorer, search: Search, windows: Windows, log: SearchLog, progress: Progress
) -> tuple[Score, Callable[[], float | None]]:
    """A score that resumes from `log`, appends to it, and tells how it goes; the dense loss."""
    known = {frozenset((*step.removed, step.block)): step.loss for step in log.steps}
    dense_loss = log.dense_loss
    if log.steps:
        # Losses are summed in the order of what the dense model thinks likely, to the same bits.
        scorer.sweep.loss(())

    def score(removed: Sequence[int], candidates: Sequence[int]) -> Scores:
        nonlocal dense_loss
        number = len(log.steps) + 1
        progress.step_begins(number, len(candidates), scorer.sweep.layer_count(removed))
        base = known.get(frozenset(removed))
        scores = scorer.score(removed, candidates, base, progress.advance)
        if not removed:
            dense_loss = scores.base
            if dense_loss is None or not math.isfinite(dense_loss):
                raise SlebError(
                    f"the dense model's loss is {dense_loss}: the weights hold NaN or overflow in "
                    f"{scorer.dtype}; try --dtype float32 or check the model"
                )
        if search.repair is not None:
            progress.repairs_begin(number, min(search.shortlist, len(candidates)))

            def loss_of(block: int) -> float:
                _, loss = scorer.repair(windows.tokens, [*removed, block])
                progress.advance()
                return loss

            scores = as_repaired(scores, candidates, search.shortlist, loss_of)
        return scores

    def on_step(step: Step) -> None:
        known[frozenset((*step.removed, step.block))] = step.loss
        log.append(step, dense_loss if not log.steps else None)
        progress.step_ended(len(log.steps), step)

    return recorded(score, tuple(log.steps), on_step), lambda: dense_loss


def as_repaired(
    scores: Scores, candidates: Sequence[int], shortlist: int, loss_of: Callable[[int], float]
) -> Scores:
    """A step's losses where the best candidates' are those with the model repaired.

    The others are put behind them: what they would be once repaired is not known.

    Args:
        scores: the losses of `candidates` as they are.
        candidates: blocks that may go.
        shortlist: how many of them are repaired.
        loss_of: the loss without a block, with all gaps repaired.
    """
    order = sorted(range(len(candidates)), key=lambda index: scores.losses[index])
    repaired = {index: loss_of(candidates[index]) for index in order[:shortlist]}
    worst = max(repaired.values())
    behind = [math.nextafter(max(worst, loss), math.inf) for loss in scores.losses]
    return replace(
        scores,
        losses=tuple(repaired.get(index, loss) for index, loss in enumerate(behind)),
        exact=tuple(index in repaired for index in range(len(candidates))),
        rivals=(),
    )


def _check_context(checkpoint: Checkpoint, sequence_length: int) -> None:
    context = context_length(checkpoint)
    if sequence_length > context:
        raise SlebError(
            f"--sequence-length {sequence_length} is more than the model's context of {context} "
            f"tokens; ask for less"
        )
