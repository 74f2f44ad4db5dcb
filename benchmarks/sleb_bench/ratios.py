"""Ratios of paired measurements, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 4
"""Neighbouring pairs in a jackknife block, because they are correlated."""
_FEWEST_BLOCKS, _MOST_BLOCKS = 8, 40
_STARTS_DIFFER = 3.0
"""Variance ratio between and within starts above which starts are the samples."""

# Student's t, two-sided 95 %, for 1 to 30 degrees of freedom; above, 1.96 + 2.4/n is within 0.3 %.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Ratio:
    """A ratio and its 95 % interval.

    Attributes:
        mean: the estimate.
        interval: the interval; None with a single value.
        samples: units of the interval: ``blocks`` of neighbouring pairs, or ``starts``.
        count: their number.
    """

    mean: float
    interval: tuple[float, float] | None
    samples: str = "blocks"
    count: int = 1

    def within(self, precision: float) -> bool:
        """Return whether the interval is within ±`precision` (0.02 for 2 %)."""
        if self.interval is None or (self.samples, self.count) == ("starts", 1):
            return False
        return math.log(self.interval[1] / self.interval[0]) / 2 <= math.log1p(precision)


def paired_ratio(starts: Sequence[Sequence[float]], *, apart: bool = False) -> Ratio:
    """Return the robust mean ratio of neighbouring pairs over several starts of the engines.

    The estimate is the Hodges-Lehmann estimator of the logarithms, which tolerates up to 29 %
    outliers. Its error comes from a jackknife over blocks of neighbouring pairs, with Student's t.
    Two engines in one process differ between starts no more than their pairs explain; if they
    differ by more, and always if each engine has its own process (`apart`), the interval is
    Student's t over the starts' estimates. With a single start, the interval is over its blocks.

    ``benchmarks/equal/intervals.py`` simulates the interval's coverage.

    Args:
        starts: the ratios of the pairs in order of time, by start; not empty, above 0.
        apart: whether the two engines had separate processes.
    """
    import numpy as np

    logs = [np.log(np.asarray(pairs, dtype=float)) for pairs in starts]
    together, blocks = np.concatenate(logs), _blocks([len(pairs) for pairs in starts])
    found = _of_blocks(together, blocks)
    if len(logs) == 1:
        return (
            _ratio(*found, "starts", 1) if apart else _ratio(*found, "blocks", int(blocks[-1]) + 1)
        )
    centres = [hodges_lehmann(values) for values in logs]
    error = float(np.std(centres, ddof=1)) / math.sqrt(len(logs))
    half = t95(len(logs) - 1) * error
    if apart:
        return _ratio(float(np.mean(centres)), half, "starts", len(logs))
    freedom = int(blocks[-1])
    # Two starts are too few: Student's t with one degree of freedom is 12.7.
    if len(logs) > 2 and error**2 > _STARTS_DIFFER * (found[1] / t95(freedom)) ** 2:
        return _ratio(float(np.mean(centres)), max(half, found[1]), "starts", len(logs))
    return _ratio(*found, "blocks", freedom + 1)


def hodges_lehmann(values: NDArray[Any]) -> float:
    """Return the median of the means of all pairs of values, including each with itself."""
    import numpy as np

    one, other = np.triu_indices(len(values))
    return float(np.median((values[one] + values[other]) / 2))


def _of_blocks(values: NDArray[Any], blocks: NDArray[Any]) -> tuple[float, float]:
    """Return the estimate and half its interval; nan with a single block."""
    import numpy as np

    one, other = np.triu_indices(len(values))
    means = (values[one] + values[other]) / 2
    count = int(blocks[-1]) + 1
    centre = float(np.median(means))
    if count == 1:
        return centre, math.nan
    # Sorted once: the median without a block is the middle of what is left, in the same order.
    order = np.argsort(means)
    means, small = means[order], blocks.astype(np.uint16)
    of_one, of_other = small[one[order]], small[other[order]]
    without = []
    for block in range(count):
        left = np.flatnonzero((of_one != block) & (of_other != block))
        middle = left[[(len(left) - 1) // 2, len(left) // 2]]
        without.append(means[middle].mean())
    variance = (count - 1) * float(np.var(without))
    return centre, t95(count - 1) * math.sqrt(variance)


def _blocks(lengths: Sequence[int]) -> NDArray[Any]:
    """Assign pairs to blocks of `BLOCK` neighbours in a start; the size fits their number."""
    import numpy as np

    pairs = sum(lengths)
    size = max(min(BLOCK, max(1, pairs // _FEWEST_BLOCKS)), math.ceil(pairs / _MOST_BLOCKS))
    sizes: list[int] = []
    for length in lengths:
        # Remaining pairs belong to the start's last block.
        full = max(1, length // size)
        sizes += [size] * (full - 1) + [length - size * (full - 1)]
    return np.repeat(np.arange(len(sizes)), sizes)


def _ratio(centre: float, half: float, samples: str, count: int) -> Ratio:
    interval = None
    if not math.isnan(half):
        interval = (math.exp(centre - half), math.exp(centre + half))
    return Ratio(math.exp(centre), interval, samples, count)


def t95(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t with `freedom` >= 1 degrees of freedom."""
    return _T95[freedom - 1] if freedom <= len(_T95) else 1.96 + 2.4 / freedom


def efficiency(ratio: float, ideal: float) -> float | None:
    """Return the measured gain over the ideal gain; None without an ideal gain."""
    return (ratio - 1) / (ideal - 1) if ideal > 1 else None


NO_GAIN, LIKE_IDEAL, BELOW, ABOVE = (
    "no gain shown",
    "not told apart from ideal",
    "below ideal",
    "above ideal",
)


def against_ideal(ratio: Ratio, ideal: float | None) -> dict[str, Any]:
    """Compare a ratio's interval with the ideal.

    Returns:
        ``verdict``, one of `BELOW`, `LIKE_IDEAL`, `ABOVE` and `NO_GAIN`; ``efficiency`` and
        ``efficiency_interval`` if the interval is below the ideal; ``efficiency_at_least`` if it
        holds the ideal. The other values are None: an efficiency above 1 has no meaning.
    """
    found: dict[str, Any] = dict.fromkeys(
        ("verdict", "efficiency", "efficiency_interval", "efficiency_at_least")
    )
    if ideal is None or ideal <= 1 or ratio.interval is None:
        return found
    low, high = ratio.interval
    if low <= 1:
        return {**found, "verdict": NO_GAIN}
    if low <= ideal <= high:
        return {**found, "verdict": LIKE_IDEAL, "efficiency_at_least": efficiency(low, ideal)}
    if low > ideal:
        return {**found, "verdict": ABOVE}
    return {
        **found,
        "verdict": BELOW,
        "efficiency": efficiency(ratio.mean, ideal),
        "efficiency_interval": [efficiency(edge, ideal) for edge in (low, high)],
    }


def outside_blocks(ratio: Ratio, num_blocks: int, removed: int) -> tuple[float, float] | None:
    """Return the interval of the share of the dense time that pruning does not reduce.

    Assumes time linear in blocks: with k of L blocks removed, the dense time is a + b L and the
    pruned one a + b (L - k); the share is a / (a + b L), clipped to 0 to 1. None if the interval is
    entirely outside.
    """
    if ratio.interval is None:
        return None
    # The faster the pruned model, the smaller the share outside the blocks.
    most, least = (1 - (1 - 1 / edge) * num_blocks / removed for edge in ratio.interval)
    return (max(0.0, least), min(1.0, most)) if most > 0 and least < 1 else None
