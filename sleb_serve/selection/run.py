"""One search on one sample of the text: loads the model, scores candidates, logs steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.data.calibration import Sequences
from sleb_serve.errors import SlebError
from sleb_serve.manifest.schema import ModelBinding, Selection
from sleb_serve.selection.config import Progress, SelectConfig
from sleb_serve.selection.log import SearchLog
from sleb_serve.selection.scorer import Scorer
from sleb_serve.selection.search import Choices, Scores, Step, greedy, recorded
from sleb_serve.utils.distributed import Ranks


@dataclass(frozen=True)
class Task:
    """The common inputs of a selection's searches.

    Attributes:
        checkpoint: the model.
        binding: its binding in the manifest.
        config: the options.
        objective: the measured loss.
        count: number of blocks to remove.
        among: the removable blocks.
        ranks: the processes that share the work.
        resume: whether to continue an earlier log.
    """

    checkpoint: Checkpoint
    binding: ModelBinding
    config: SelectConfig
    objective: str
    count: int
    among: tuple[int, ...]
    ranks: Ranks
    resume: bool

    def subject(self, sequences: Sequences, selection: Selection) -> dict[str, object]:
        """Return the inputs of a search, which identify its log."""
        return {
            "model": {**asdict(self.binding), "id": None, "block_sha256": None},
            "calibration": asdict(sequences.calibration),
            "selection": {k: v for k, v in asdict(selection).items() if k != "samples"},
        }


class Search:
    """A greedy search on one sample of the text.

    Args:
        task: the common inputs.
        sequences: the sample.
        log: the log of the steps, or None.
        progress: receives progress events.

    Attributes:
        choices: the blocks in order of removal, and their losses.
        dense_loss: the dense model's loss.
        scorer: the scorer with its model.
        selection: the manifest's entry.
    """

    def __init__(
        self, task: Task, sequences: Sequences, log: Path | None, progress: Progress
    ) -> None:
        config = task.config
        self._progress, self._until = progress, config.until
        self.scorer = Scorer(
            task.checkpoint,
            sequences,
            task.ranks,
            dtype=config.dtype,
            budget=config.memory_budget,
            steps=task.count,
            fast=config.search == "fast",
            objective=task.objective,
        )
        self.selection = Selection(
            method=config.method,
            early_barrier=config.early_barrier,
            late_barrier=config.late_barrier,
            dtype=self.scorer.dtype,
            objective=task.objective,
        )
        writes = task.ranks.index == 0
        self._log = SearchLog(log, task.subject(sequences, self.selection), writes=writes)
        if task.resume:
            self._log.resume()
        else:
            self._log.start()
        progress.loaded(sequences, self._log.steps, self.scorer.how)
        self.dense_loss = self._log.dense_loss
        self._known = {frozenset((*s.removed, s.block)): s.loss for s in self._log.steps}
        if self._log.steps:
            # Sum losses in the same order as for the dense model, for identical bits.
            self.scorer.sweep.loss(())
        self.choices: Choices = greedy(
            recorded(self._score, tuple(self._log.steps), self._step_ended),
            num_blocks=task.checkpoint.num_blocks,
            remove=task.count,
            early_barrier=config.early_barrier,
            late_barrier=config.late_barrier,
            among=task.among,
            allowed=self._allowed,
        )
        if not self.choices:
            raise SlebError(
                f"until={config.until}: removing a single block already exceeds this limit; allow "
                "more"
            )

    def _allowed(self, loss: float) -> bool:
        until = self._until
        return until is None or loss - (self.dense_loss or 0.0) < math.log(until)

    def _score(self, removed: Sequence[int], candidates: Sequence[int]) -> Scores:
        number = len(self._log.steps) + 1
        layers = self.scorer.sweep.layer_count(removed)
        self._progress.step_begins(number, len(candidates), layers)
        base = self._known.get(frozenset(removed))
        scores = self.scorer.score(removed, candidates, base, self._progress.advance)
        if not removed:
            self.dense_loss = scores.base
            if self.dense_loss is None or not math.isfinite(self.dense_loss):
                raise SlebError(
                    f"the dense model's loss is {self.dense_loss}: the weights hold NaN or "
                    f"overflow in {self.scorer.dtype}; try dtype=float32 or check the model"
                )
        return scores

    def _step_ended(self, step: Step) -> None:
        self._known[frozenset((*step.removed, step.block))] = step.loss
        self._log.append(step, self.dense_loss if not self._log.steps else None)
        self._progress.step_ended(len(self._log.steps), step)
