"""A faster search that may err: candidates leave a step once they are unlikely to win it.

Two rules, each with half of the error that a step is allowed:

- *Racing.* After each group of sequences, every candidate's losses are taken in pairs with the
  leader's over segments of text. What is known gives a probability that it would yet end below the
  leader on all of the text: one side of Student's t, narrowed for the share of the text that was
  seen. The least probable go, as long as the probabilities of all that went sum up to no more than
  the error allowed.
- *Laziness.* How much a block's absence costs changes little from one step to the next, and by how
  much it was seen to change gives a probability, too, that a block costs less now than the best.

The candidates that are left are scored on all sequences, so the winner's loss is exact. Where a
second scorer is given, a copy of the model in a cheaper dtype, the race is run on that, and only
those that come in close behind its winner are scored in the dtype that was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist, fmean, stdev
from typing import Protocol

from sleb_serve.selection.search import Scores

Segments = Mapping[int, Sequence[float]]
"""By candidate: its loss on each segment of the text so far, the same segments for all."""
Drop = Callable[[Segments, float], frozenset[int]]
"""drop(segments, share): the candidates to go, after `share` of the sequences."""

SEGMENT_TOKENS = 32
_FEWEST = 10
"""Observations without which no variance is believed."""
_MARGIN, _NOISE, _FEW = 0.01, 6.0, 4
"""How close behind is close: nats at first, then so many times the largest difference seen between
the two dtypes."""
_CLOSE = 2.0
"""Standard errors within which two candidates count as not told apart."""


class Scorer(Protocol):
    """What a race is run on: see `sleb_serve.selection.layer_sweep.LayerSweep.score`."""

    def score(
        self,
        removed: Sequence[int],
        candidates: Sequence[int],
        *,
        on_layer: Callable[[], None] = ...,
        drop: Drop = ...,
        slack: float = ...,
    ) -> Scores:
        """Losses of candidates; those that `drop` names on the way get an estimate."""


def rivals(segments: Segments, winner: int) -> tuple[int, ...]:
    """Candidates that this text does not tell from the winner: within two standard errors."""
    found = []
    for block, losses in segments.items():
        mean, error = _paired(losses, segments[winner])
        if block != winner and len(losses) == len(segments[winner]) and mean < _CLOSE * error:
            found.append(block)
    return tuple(found)


class Budget:
    """An error that may be spent in portions."""

    def __init__(self, error: float) -> None:
        self._left = error

    def spend(self, chances: Mapping[int, float]) -> frozenset[int]:
        """The candidates of least chance whose chances together are still within the budget."""
        gone: set[int] = set()
        for block in sorted(chances, key=lambda c: chances[c]):
            if chances[block] > self._left:
                break
            self._left -= chances[block]
            gone.add(block)
        return frozenset(gone)


def racing(budget: Budget) -> Drop:
    """The rule of racing, for one step."""

    def drop(segments: Segments, share: float) -> frozenset[int]:
        means = {block: fmean(losses) for block, losses in segments.items()}
        leader = min(means, key=lambda block: means[block])
        count = len(segments[leader])
        if share >= 1 or count < _FEWEST:
            return frozenset()
        chances = {}
        for block, losses in segments.items():
            mean, error = _paired(losses, segments[leader])
            if block != leader and error > 0 and math.isfinite(mean):
                chances[block] = _tail(mean / error / math.sqrt(1 - share), count - 1)
        return budget.spend(chances)

    return drop


class FastSearch:
    """A score for the greedy search that looks only at what may win.

    Args:
        scorer: the exact scores.
        error: probability that any of the steps goes another way than the exact search's.
        steps: how many steps there will be.
        screen: the same in a cheaper dtype.
    """

    def __init__(
        self, scorer: Scorer, *, error: float, steps: int, screen: Scorer | None = None
    ) -> None:
        self._scorer = scorer
        self._screen = screen
        self._differences: list[float] = []
        self._error = error / steps / 2
        self._costs: dict[int, tuple[float, int]] = {}
        self._changes: list[float] = []

    def score(
        self,
        removed: Sequence[int],
        candidates: Sequence[int],
        base: float | None,
        *,
        on_layer: Callable[[], None] = lambda: None,
    ) -> Scores:
        """Losses of a step; those not marked exact are estimates, higher than the winner's.

        Args:
            removed: blocks that are gone.
            candidates: blocks to try.
            base: the loss with `removed` gone, None if not known yet.
            on_layer: see `LayerSweep.score`.
        """
        drop = racing(Budget(self._error))
        best = min((self._costs[c][0] for c in candidates if c in self._costs), default=math.inf)
        found: dict[int, tuple[float, bool]] = {}
        close: tuple[int, ...] = ()
        while ask := self._worth_a_look([c for c in candidates if c not in found], best):
            scores = self._race(removed, ask, on_layer, drop)
            base = scores.base if base is None else base
            found |= dict(zip(ask, zip(scores.losses, scores.exact, strict=True), strict=True))
            assert base is not None
            least = min(loss for loss, _ in found.values())
            if least in scores.losses:
                close = scores.rivals
            # The best may cost more than was thought, and others have a chance after all.
            best = max(best, least - base)
        assert base is not None
        self._learn({block: loss - base for block, (loss, _) in found.items()})
        for block in candidates:
            if block not in found:
                # It was passed over because it costs more than the best by all that is known.
                found[block] = (base + max(self._costs[block][0], least - base + 1e-9), False)
        losses, exact = zip(*(found[block] for block in candidates), strict=True)
        return Scores(losses, exact, base, close)

    def _race(
        self,
        removed: Sequence[int],
        candidates: Sequence[int],
        on_layer: Callable[[], None],
        drop: Drop,
    ) -> Scores:
        if self._screen is None:
            return self._scorer.score(removed, candidates, on_layer=on_layer, drop=drop)
        margin = _MARGIN
        if len(self._differences) >= _FEW:
            centre = fmean(self._differences)
            margin = _NOISE * max(abs(value - centre) for value in self._differences)
        rough = self._screen.score(removed, candidates, on_layer=on_layer, drop=drop, slack=margin)
        least = min(rough.losses)
        close = {
            block: loss
            for block, loss, exact in zip(candidates, rough.losses, rough.exact, strict=True)
            if exact and loss <= least + margin
        }
        fine = self._scorer.score(removed, list(close))
        self._differences += [
            loss - close[block]
            for block, loss, exact in zip(close, fine.losses, fine.exact, strict=True)
            if exact
        ]
        known = dict(zip(close, zip(fine.losses, fine.exact, strict=True), strict=True))
        shift = min(fine.losses) - least
        results = [
            known.get(block, (max(loss + shift, min(fine.losses) + 1e-9), False))
            for block, loss in zip(candidates, rough.losses, strict=True)
        ]
        losses, exact = zip(*results, strict=True)
        return Scores(losses, exact, fine.base, rough.rivals)

    def _worth_a_look(self, candidates: Sequence[int], best: float) -> list[int]:
        """Those that cannot be passed over within the error."""
        passed = Budget(self._error).spend({c: self._chance(c, best) for c in candidates})
        return [c for c in candidates if c not in passed]

    def _chance(self, block: int, best: float) -> float:
        """The probability that a block's absence costs less than `best` now."""
        cost, age = self._costs.get(block, (0.0, 0))
        if cost <= 0 or best <= 0 or len(self._changes) < _FEWEST:
            return 1.0
        expected = math.log(cost) + age * min(0.0, fmean(self._changes))
        spread = stdev(self._changes) * math.sqrt(age)
        return _tail((expected - math.log(best)) / spread, len(self._changes) - 1)

    def _learn(self, costs: Mapping[int, float]) -> None:
        for block, cost in costs.items():
            before, age = self._costs.get(block, (0.0, 0))
            if before > 0 and cost > 0 and age == 1:
                self._changes.append(math.log(cost / before))
        self._costs = {block: (cost, age + 1) for block, (cost, age) in self._costs.items()}
        self._costs |= {block: (cost, 1) for block, cost in costs.items()}


def _paired(one: Sequence[float], two: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the differences of two lists, over the shorter's length."""
    differences = [a - b for a, b in zip(one, two, strict=False)]
    mean = fmean(differences)
    if len(differences) < 2 or not math.isfinite(mean):
        return mean, math.inf
    return mean, stdev(differences) / math.sqrt(len(differences))


def _tail(t: float, degrees: int) -> float:
    """P(Student's t > t), by Wallace's approximation (1959, doi 10.1214/aoms/1177705809)."""
    z = math.sqrt(degrees * math.log1p(t * t / degrees)) * (8 * degrees + 1) / (8 * degrees + 3)
    return 1 - NormalDist().cdf(math.copysign(z, t))


def lead(best: Sequence[float], other: Sequence[float]) -> float:
    """By how much one is better than another on the text that the other was scored on."""
    return math.fsum(a - b for a, b in zip(other, best, strict=False)) / len(other)
