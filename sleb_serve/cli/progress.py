"""What the command line shows on standard error while it works."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from tqdm import tqdm

from sleb_serve.data.calibration import Sequences
from sleb_serve.evaluation.evaluate import Progress as EvalProgress
from sleb_serve.selection.config import Progress as SearchProgress
from sleb_serve.selection.distributed import is_first
from sleb_serve.selection.search import Step

if TYPE_CHECKING:
    from sleb_serve.selection.repair import Gap


class SearchBars(SearchProgress):
    """Progress of a search on standard error, of the first process only."""

    def __init__(self) -> None:
        self._bar: tqdm[NoReturn] | None = None
        self._silent = not is_first()

    def __enter__(self) -> SearchBars:
        return self

    def __exit__(self, *error: object) -> None:
        # An error message must not stand behind half a progress bar.
        if self._bar is not None:
            self._bar.close()

    def loaded(self, sequences: Sequences, resumed: Sequence[Step], how: str) -> None:
        """The model and the text are there."""
        text = sequences.calibration
        self._say(f"calibration: {text.sequences} sequences of {text.sequence_length} tokens")
        self._say(f"scoring: {how}")
        for number, step in enumerate(resumed, 1):
            self._say(f"{self._line(number, step)} (resumed)")

    def step_begins(self, number: int, candidates: int, layers: int) -> None:
        """A bar for the step."""
        self._begin(f"step {number}: {candidates} candidates", layers, "layer")

    def advance(self) -> None:
        """The bar moves on."""
        assert self._bar is not None
        self._bar.update()

    def step_ended(self, number: int, step: Step) -> None:
        """A line for the step, in place of its bar."""
        assert self._bar is not None
        self._bar.close()
        close = ", ".join(map(str, step.rivals))
        note = f"; this text does not tell it from {close}" if close else ""
        self._say(f"{self._line(number, step)}{note}")

    def repaired(self, gaps: Sequence[Gap], loss: float) -> None:
        """A line for each gap."""
        for gap in gaps:
            self._say(
                f"gap {gap.first} to {gap.last}: {1 - gap.missing:.0%} of what is missing repaired "
                f"on held-out sequences (ridge {gap.ridge:g})"
            )
        self._say(f"repaired: loss {loss:.4f}")

    @staticmethod
    def _line(number: int, step: Step) -> str:
        return f"step {number}: block {step.block}, loss {step.loss:.4f}"

    def _begin(self, text: str, total: int, unit: str) -> None:
        self._bar = tqdm(total=total, desc=text, unit=unit, leave=False, disable=self._silent)

    def _say(self, text: str) -> None:
        if not self._silent:
            say(text)


class EvalLines(EvalProgress):
    """What is being judged, a line each."""

    def begins(self, blocks: int, what: str) -> None:
        """A perplexity or tasks come next."""
        say(f"{_removed(blocks)}: {what}")

    def known(self, blocks: int, what: str) -> None:
        """That is there already."""
        say(f"{_removed(blocks)}: {what} (resumed)")


class ShardBar:
    """Progress of an export."""

    def __enter__(self) -> ShardBar:
        self._bar: tqdm[NoReturn] = tqdm(desc="writing", unit="shard", leave=False)
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def shard_done(self, number: int, count: int) -> None:
        """One of `count` shards is written."""
        self._bar.total = count
        self._bar.update()


def _removed(blocks: int) -> str:
    return f"{blocks} blocks removed" if blocks else "dense"


def say(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr, flush=True)
