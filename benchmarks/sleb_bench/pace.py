"""Stopping rules: until the intervals are narrow enough or the time is up."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sleb_bench.ratios import Ratio

TURN = 0.1
"""Target seconds per turn.

On shared machines the speed changes at every time scale: short turns differ hardly more than long
ones, and there are more pairs in the same time (``benchmarks/equal/noise.py``).
"""
PRECISE, TIME_OVER = "precise", "time over"
FEWEST = 16
"""Minimum number of pairs for an interval."""
_FEWEST_A_START = 4
_MORE = 1.1
"""Growth of the number of rounds between two looks at the intervals."""
_MOST_CALLS = 256
_WARM_UP_MOST = 8
_TREND = 0.05

Ratios = Mapping[str, Sequence[Ratio]]
"""Results so far, by workload."""


def warms_up(times: Sequence[float]) -> bool:
    """Return whether warm-up continues: the newest call time is the lowest by more than 5 %.

    Takes two to eight turns.
    """
    if len(times) < 2:
        return True
    return len(times) < _WARM_UP_MOST and times[-1] < (1 - _TREND) * min(times[:-1])


def calls_a_turn(seconds: float) -> int:
    """Return the number of calls in a turn of about `TURN` seconds."""
    return max(1, min(_MOST_CALLS, round(TURN / seconds)))


def is_due(rounds: int, judged: int) -> bool:
    """Return whether to compute the intervals after `rounds`, last done after `judged`.

    Looking less often costs less, and stops fewer runs at an interval that is narrow by chance.
    """
    return rounds <= FEWEST or rounds >= _MORE * judged


@dataclass
class Pace:
    """Decides when a start of the engines ends, and when the run ends.

    Attributes:
        precision: target half-width of intervals, 0.02 for 2 %.
        minutes: time limit from when the first engines are ready, including later starts.
        starts: minimum number of starts, if there is time.
        apart: whether engines have separate processes, so that only more starts help.
        clock: returns seconds.
    """

    precision: float
    minutes: float
    starts: int
    apart: bool
    clock: Callable[[], float] = time.monotonic
    begin: float | None = None

    def ready(self) -> None:
        """Start the clock when the first engines are ready; later calls do nothing."""
        if self.begin is None:
            self.begin = self.clock()

    def spent(self) -> float:
        """Return the minutes so far."""
        return 0.0 if self.begin is None else (self.clock() - self.begin) / 60

    def unfinished(self, ratios: Ratios, start: int, rounds: int) -> list[str]:
        """Return the workloads that need more pairs in this start; empty if it is over.

        A workload is done with a start when all its intervals are narrow enough to reach the
        precision by the last start.

        Args:
            ratios: ratios of all starts so far.
            start: the number of this start, from 1.
            rounds: measured in this start.
        """
        if rounds < 2 or rounds % 2:
            return list(ratios)  # the order of a pair must not matter
        share = min(1.0, start / self.starts)
        if self.spent() >= self.minutes * share:
            return []
        over_starts = any(r.samples == "starts" for found in ratios.values() for r in found)
        if rounds >= FEWEST and (self.apart or (start >= self.starts and over_starts)):
            return []
        if rounds < _FEWEST_A_START or rounds * start < FEWEST:
            return list(ratios)
        goal = math.expm1(math.log1p(self.precision) / math.sqrt(share))
        return [name for name, found in ratios.items() if not all(r.within(goal) for r in found)]

    def verdict(self, ratios: Ratios, start: int, seconds: float) -> str | None:
        """Return why the run ends now, `PRECISE` or `TIME_OVER`; None for another start.

        Args:
            ratios: ratios of all starts so far.
            start: the number of this start.
            seconds: time to start the engines, also expected for the next start.
        """
        precise = all(r.within(self.precision) for found in ratios.values() for r in found)
        if precise and start >= self.starts:
            return PRECISE
        if self.spent() + seconds / 60 < self.minutes:
            return None
        return PRECISE if precise else TIME_OVER
