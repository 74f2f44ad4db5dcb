"""Progress output on standard error."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from tqdm import tqdm

from sleb_serve.data.calibration import Sequences
from sleb_serve.evaluation.evaluate import Progress as EvalProgress
from sleb_serve.healing.config import Judgement
from sleb_serve.healing.config import Progress as HealProgress
from sleb_serve.manifest.schema import Training, perplexity_of
from sleb_serve.selection.config import Progress as SearchProgress
from sleb_serve.selection.search import Step
from sleb_serve.utils.distributed import is_first
from sleb_serve.utils.sizes import format_size
from sleb_serve.utils.terminal import printable

if TYPE_CHECKING:
    from sleb_serve.roofline.target import SpeedTarget
    from sleb_serve.selection.repair import Gap


class SearchBars(SearchProgress):
    """Search progress on standard error, printed by the first process only."""

    def __init__(self) -> None:
        self._bar: tqdm[NoReturn] | None = None
        self._read_bar = ReadBar()
        self._silent = not is_first()

    def __enter__(self) -> SearchBars:
        return self

    def __exit__(self, *error: object) -> None:
        # An error message must not stand behind half a progress bar.
        self._read_bar.close()
        if self._bar is not None:
            self._bar.close()

    def loaded(self, sequences: Sequences, resumed: Sequence[Step], how: str) -> None:
        """Report the loaded model and text."""
        text = sequences.calibration
        self._say(f"calibration: {text.sequences} sequences of {text.sequence_length} tokens")
        self._say(f"scoring: {how}")
        for number, step in enumerate(resumed, 1):
            self._say(f"{self._line(number, step)} (resumed)")

    def reading(self, done: int, total: int) -> None:
        """A bar for the bytes that are read."""
        if not self._silent:
            self._read_bar.reading(done, total)

    def aimed(self, target: SpeedTarget, blocks: int) -> None:
        """Report how many blocks the speed-up needs."""
        self._say(
            f"{target.load} {target.speedup:g} times as fast on {target.gpus} x {target.gpu}: "
            f"remove {blocks} blocks, according to the roofline"
        )

    def step_begins(self, number: int, candidates: int, layers: int) -> None:
        """Start a bar for the step."""
        self._begin(f"step {number}: {candidates} candidates", layers, "layer")

    def advance(self) -> None:
        """The bar moves on."""
        assert self._bar is not None
        self._bar.update()

    def step_ended(self, number: int, step: Step) -> None:
        """Replace the step's bar with a line."""
        assert self._bar is not None
        self._bar.close()
        close = ", ".join(map(str, step.rivals))
        note = f"; within two standard errors: {close}" if close else ""
        self._say(f"{self._line(number, step)}{note}")

    def repaired(self, gaps: Sequence[Gap], loss: float) -> None:
        """A line for each gap."""
        for gap in gaps:
            self._say(
                f"gap {gap.first} to {gap.last}: {1 - gap.missing:.0%} of the missing output "
                "repaired "
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
    """Evaluation progress, one line per measurement."""

    def begins(self, blocks: int, what: str) -> None:
        """Report the next perplexity or tasks."""
        say(f"{_removed(blocks)}: {what}")

    def known(self, blocks: int, what: str) -> None:
        """Report a result that already exists."""
        say(f"{_removed(blocks)}: {what} (resumed)")


class HealBars(HealProgress):
    """Healing progress on standard error, printed by the first process only."""

    def __init__(self) -> None:
        self._bar: tqdm[NoReturn] | None = None
        self._silent = not is_first()
        self._perplexity = ""

    def __enter__(self) -> HealBars:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def begins(self, blocks: int, trained: int, size: int) -> None:
        """Print a line and start a bar."""
        if not self._silent:
            about = f"{trained:,} trainable parameters, {format_size(size)} of weights"
            say(f"{_removed(blocks)}: {about}")
        self._bar = tqdm(
            total=1000,
            desc="healing",
            disable=self._silent,
            leave=False,
            bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}",
        )

    def stepped(self, done: float, loss: float, tokens: int) -> None:
        """The bar moves on."""
        assert self._bar is not None
        self._bar.set_postfix_str(f"{tokens:,} tokens, loss {loss:.3f}{self._perplexity}", False)
        self._bar.update(round(1000 * done) - self._bar.n)

    def judged(self, done: float, judgement: Judgement) -> None:
        """Print a line for each validation."""
        perplexity, dense = (
            perplexity_of(loss) or math.inf for loss in (judgement.loss, judgement.dense_loss)
        )
        self._perplexity = f", held-out perplexity {perplexity:.2f} (dense {dense:.2f})"
        if not self._silent:
            tqdm.write(
                f"{done:4.0%}: perplexity {perplexity:.2f} (dense {dense:.2f}), divergence "
                f"{judgement.kl:.4f}, same token {judgement.agreement:.1%}",
                file=sys.stderr,
            )

    def ended(self, blocks: int, training: Training, early: bool) -> None:
        """Close the bar."""
        assert self._bar is not None
        self._bar.close()
        if early and not self._silent:
            say("stopped early without improvement; the best validated model is kept")


class ShardBar:
    """Export progress."""

    def __enter__(self) -> ShardBar:
        self._bar: tqdm[NoReturn] = tqdm(desc="writing", unit="shard", leave=False)
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def shard_done(self, number: int, count: int) -> None:
        """Report that one of `count` shards was written."""
        self._bar.total = count
        self._bar.update()


class ReadBar:
    """Progress of reading weights for their full digest, while they are read."""

    def __init__(self) -> None:
        self._bar: tqdm[NoReturn] | None = None

    def __enter__(self) -> ReadBar:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def reading(self, done: int, total: int) -> None:
        """So many of the bytes are read."""
        if self._bar is None:
            self._bar = tqdm(
                total=total, desc="reading weights", unit="B", unit_scale=True, leave=False
            )
        self._bar.update(done - self._bar.n)
        if done == total:
            self.close()

    def close(self) -> None:
        """The bar goes."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _removed(blocks: int) -> str:
    return f"{blocks} blocks removed" if blocks else "dense"


def say(text: str) -> None:
    """Print a line on standard error."""
    print(printable(text), file=sys.stderr, flush=True)


def tell(text: str) -> None:
    """Print on standard output, with control characters escaped for terminals."""
    print(printable(text), flush=True)
