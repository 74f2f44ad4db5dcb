"""Selection from end to end: a model and a text in, a manifest out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sleb_serve import __version__
from sleb_serve.calibration import Windows, make_windows
from sleb_serve.checkpoint import Checkpoint, download_weights, open_checkpoint
from sleb_serve.errors import SlebError, first_line
from sleb_serve.files import check_writable
from sleb_serve.manifest import Manifest, ModelBinding, Removal, Repair, Selection
from sleb_serve.memory import parse_size
from sleb_serve.ranks import launched
from sleb_serve.search_log import SearchLog, log_path
from sleb_serve.selection import Scores, Step, blocks_to_remove, greedy
from sleb_serve.sidecar import sidecar_path, write_sidecar

if TYPE_CHECKING:
    from sleb_serve.repair import Gap

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""What a model can be scored in; ``auto`` is the checkpoint's own."""

SEARCHES = {"greedy": "sleb", "fast": "sleb-fast"}
"""How to search, and what the manifest calls it."""

OFFICIAL_SEQUENCE_LENGTH = 2048
"""The official code's window, where the model's context is not shorter."""


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
    repair: str = "none"
    repair_sequences: int | None = None
    memory_budget: str | None = None
    resume: bool = False


class Progress(Protocol):
    """Told how the search goes."""

    def loaded(self, windows: Windows, resumed: Sequence[Step], how: str) -> None:
        """The model and the text are there; these steps need not be computed again."""

    def step_begins(self, number: int, candidates: int, layers: int) -> None:
        """A step begins: so many candidates, in so many runs of a layer on a window's states."""

    def layer_done(self) -> None:
        """A layer has been run on the states of one window."""

    def step_ended(self, number: int, step: Step) -> None:
        """A step is finished and logged."""

    def repaired(self, gaps: Sequence[Gap], loss: float) -> None:
        """The gaps were repaired, and this is the calibration loss with that."""


def select(options: SelectOptions, progress: Progress) -> Manifest:
    """Search for the blocks to remove and write the manifest, and beside it the search's log.

    Raises:
        SlebError: what was asked for cannot be done; nothing was written, or nothing more than the
            log of the steps that were finished.
    """
    from sleb_serve.causal_lm import check_causal_lm
    from sleb_serve.scorer import Scorer

    ranks = launched()
    checkpoint = open_checkpoint(options.model, options.revision)
    check_causal_lm(checkpoint)
    count = blocks_to_remove(
        options.remove, checkpoint.num_blocks, options.early_barrier, options.late_barrier
    )
    check_writable(options.output)
    budget = parse_size(options.memory_budget) if options.memory_budget else None
    download_weights(options.model, options.revision)

    cut = partial(
        make_windows,
        options.calibration,
        load_tokenizer(checkpoint),
        sequence_length=options.sequence_length
        or min(OFFICIAL_SEQUENCE_LENGTH, _context_length(checkpoint)),
        seed=options.seed,
    )
    windows = cut(sequences=options.sequences, rows=options.rows)
    more_windows = windows
    if options.repair_sequences is not None:
        more_windows = cut(sequences=options.repair_sequences)
    _check_context(checkpoint, windows.calibration.sequence_length)
    scorer = Scorer(
        checkpoint,
        windows,
        ranks,
        dtype=options.dtype,
        budget=budget,
        steps=count,
        fast=options.search == "fast",
    )
    binding = bind(options.model, checkpoint)
    selection = Selection(
        method=SEARCHES[options.search],
        early_barrier=options.early_barrier,
        late_barrier=options.late_barrier,
        dtype=scorer.dtype,
    )

    log = SearchLog(
        log_path(options.output),
        {
            "model": {**asdict(binding), "id": None, "block_sha256": None},
            "calibration": asdict(windows.calibration),
            "selection": asdict(selection),
        },
        writes=ranks.index == 0,
    )
    if options.resume:
        log.resume()
    else:
        log.start()
    progress.loaded(windows, log.steps, scorer.how)
    if log.steps:
        # Losses are summed in the order of what the dense model thinks likely, to the same bits.
        scorer.sweep.loss(())

    dense_loss = log.dense_loss

    def score(removed: Sequence[int], candidates: Sequence[int]) -> Scores:
        nonlocal dense_loss
        layers = scorer.sweep.layer_count(removed)
        progress.step_begins(len(removed) + 1, len(candidates), layers)
        base = log.steps[-1].loss if log.steps else None
        scores = scorer.score(removed, candidates, base, progress.layer_done)
        if not removed:
            dense_loss = scores.base
            if dense_loss is None or not math.isfinite(dense_loss):
                raise SlebError(
                    f"the dense model's loss is {dense_loss}: the weights hold NaN or overflow in "
                    f"{selection.dtype}; try --dtype float32 or check the model"
                )
        return scores

    def on_step(step: Step) -> None:
        log.append(step, dense_loss if not log.steps else None)
        progress.step_ended(len(log.steps), step)

    steps = greedy(
        score,
        num_blocks=checkpoint.num_blocks,
        remove=count,
        early_barrier=options.early_barrier,
        late_barrier=options.late_barrier,
        done=log.steps,
        on_step=on_step,
    )
    repair = None
    if options.repair != "none" and ranks.index == 0:
        removed = [step.block for step in steps]
        mended, loss = scorer.repair(options.repair, more_windows.tokens, removed)
        progress.repaired(mended, loss)
        sidecar = sidecar_path(options.output)
        about = {"weights_sha256": binding.weights_sha256, "removed": sorted(removed)}
        digest = write_sidecar(sidecar, {gap.tensor: gap.weight for gap in mended}, about)
        repair = Repair(
            options.repair, sidecar.name, digest, more_windows.calibration.sequences, loss
        )
    manifest = Manifest(
        model=binding,
        removed=tuple(Removal(step.block, step.loss) for step in steps),
        dense_loss=dense_loss,
        calibration=windows.calibration,
        selection=selection,
        repair=repair,
        created_by={
            "sleb_serve": __version__,
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
    )
    if ranks.index == 0:
        manifest.write(options.output)
    return manifest


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


def load_tokenizer(checkpoint: Checkpoint) -> Callable[[str], Sequence[int]]:
    """The checkpoint's own tokenizer: text to token ids, with the special tokens it adds.

    Raises:
        SlebError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(checkpoint.path))
    except Exception as error:
        raise SlebError(
            f"cannot load the tokenizer of {checkpoint.path}: {first_line(error)}; the folder "
            f"must hold the tokenizer's files too"
        ) from error
    # verbose=False: a text longer than the model's context is cut into windows, not fed whole.
    return lambda text: list(tokenizer(text, verbose=False)["input_ids"])


def _context_length(checkpoint: Checkpoint) -> int:
    for key in ("max_position_embeddings", "n_positions", "seq_length", "max_sequence_length"):
        value = checkpoint.config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return OFFICIAL_SEQUENCE_LENGTH


def _check_context(checkpoint: Checkpoint, sequence_length: int) -> None:
    context = _context_length(checkpoint)
    if sequence_length > context:
        raise SlebError(
            f"--sequence-length {sequence_length} is more than the model's context of {context} "
            f"tokens; ask for less"
        )
