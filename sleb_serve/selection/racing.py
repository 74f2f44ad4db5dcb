"""A faster search with a small error probability: drops candidates that are unlikely to win.

Two rules each use half of a step's error budget:

- *Racing.* After each group of sequences, every candidate's losses are paired with the leader's
over segments of text. This gives the probability that it would still end below the leader on the
whole text: a one-sided Student's t, narrowed for the share of the text so far. The least probable
candidates are dropped while their probabilities sum to at most the error budget. - *Laziness.* The
cost of removing a block changes little between steps. The observed changes give the probability
that a block now costs less than the best.

The remaining candidates are scored on all sequences, so the winner's loss is exact. With a second
scorer, a copy of the model in a cheaper dtype, the race runs on that, and only candidates close to
its winner are scored in the requested dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist, fmean, stdev
from typing import Protocol

from sleb_serve.selection.search import Scores

Segments = Mapping[int, Sequence[float]]
"""Losses by candidate on each segment of the text so far, the same segments for all."""
Drop = Callable[[Segments, float], frozenset[int]]
"""drop(segments, share): returns the candidates to drop after `share` of the sequences."""

SEGMENT_TOKENS = 32
_FEWEST = 10
"""Minimum number of observations for a variance."""
_MARGIN, _NOISE, _FEW = 0.01, 6.0, 4
"""Close candidates: an initial margin in nats, then this multiple of the largest difference between
the two dtypes.
"""
_CLOSE = 2.0
"""Candidates within this many standard errors count as rivals."""


class Scorer(Protocol):
    """A scorer for races; see `sleb_serve.selection.layer_sweep.LayerSweep.score`."""

    def score(
        self,
        removed: Sequence[int],
        candidates: Sequence[int],
        *,
        on_layer: Callable[[], None] = ...,
        drop: Drop = ...,
        slack: float = ...,
    ) -> Scores:
        """Return losses of candidates; those that `drop` returns get an estimate."""


def rivals(segments: Segments, winner: int) -> tuple[int, ...]:
    """Return candidates within two standard errors of the winner."""
    found = []
    for block, losses in segments.items():
        mean, error = _paired(losses, segments[winner])
        if block != winner and len(losses) == len(segments[winner]) and mean < _CLOSE * error:
            found.append(block)
    return tuple(found)


class Budget:
    """An error budget that can be spent in portions."""

    def __init__(self, error: float) -> None:
        self._left = error

    def spend(self, chances: Mapping[int, float]) -> frozenset[int]:
        """Spend the budget on the candidates with the lowest chances, and return them."""
        gone: set[int] = set()
        for block in sorted(chances, key=lambda c: chances[c]):
            if chances[block] > self._left:
                break
            self._left -= chances[block]
            gone.add(block)
        return frozenset(gone)


def racing(budget: Budget) -> Drop:
    """The racing rule for one step."""

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
    """A score for the greedy search that considers only possible winners.

    Args:
        scorer: the exact scores.
        error: probability that any step differs from the exact search.
        steps: number of steps.
        screen: a scorer in a cheaper dtype.
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
        """Return the losses of a step; inexact ones are estimates above the winner's.

        Args:
            removed: blocks that are already removed.
            candidates: blocks to try.
            base: the loss without `removed`, or None if unknown.
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
            # If the best costs more than expected, others have a chance again.
            best = max(best, least - base)
        assert base is not None
        self._learn({block: loss - base for block, (loss, _) in found.items()})
        for block in candidates:
            if block not in found:
                # It was skipped because it is known to cost more than the best.
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
        """Return the candidates that cannot be skipped within the error budget."""
        passed = Budget(self._error).spend({c: self._chance(c, best) for c in candidates})
        return [c for c in candidates if c not in passed]

    def _chance(self, block: int, best: float) -> float:
        """Return the probability that removing a block now costs less than `best`."""
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
    """Return mean and standard error of the differences of two lists, up to the shorter length."""
    differences = [a - b for a, b in zip(one, two, strict=False)]
    mean = fmean(differences)
    if len(differences) < 2 or not math.isfinite(mean):
        return mean, math.inf
    return mean, stdev(differences) / math.sqrt(len(differences))


def _tail(t: float, degrees: int) -> float:
    """Return P(Student's t > t) by Wallace's approximation (1959, doi 10.1214/aoms/1177705809)."""
    z = math.sqrt(degrees * math.log1p(t * t / degrees)) * (8 * degrees + 1) / (8 * degrees + 3)
    return 1 - NormalDist().cdf(math.copysign(z, t))


def lead(best: Sequence[float], other: Sequence[float]) -> float:
    """Return how much better one is than another on the text that the other was scored on."""
    return math.fsum(a - b for a, b in zip(other, best, strict=False)) / len(other)
