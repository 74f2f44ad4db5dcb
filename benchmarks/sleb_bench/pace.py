"""How long to measure: until the intervals are narrow enough, or the time is over."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sleb_bench.ratios import Ratio

TURN = 1.0
"""Seconds that a turn should take."""
PRECISE, TIME_OVER = "precise", "time over"
FEWEST = 8
"""Pairs before an interval is judged."""
_FEWEST_A_START = 4
_MOST_CALLS = 256
_WARM_UP_MOST = 8
_TREND = 0.05

Ratios = Mapping[str, Sequence[Ratio]]
"""What is known so far, by workload."""


def warms_up(times: Sequence[float]) -> bool:
    """Whether the trend goes on: the newest of the seconds a call is the least by over 5 %.

    Two turns at least, eight at most.
    """
    if len(times) < 2:
        return True
    return len(times) < _WARM_UP_MOST and times[-1] < (1 - _TREND) * min(times[:-1])


def calls_a_turn(seconds: float) -> int:
    """How many calls of so many seconds make a turn of about a second."""
    return max(1, min(_MOST_CALLS, round(TURN / seconds)))


@dataclass
class Pace:
    """When a start of the engines is over, and when the run is.

    Attributes:
        precision: how far an interval may reach to a side, 0.02 for 2 %.
        minutes: from when the first engines are ready; the starts of others count.
        starts: at least so many, while there is time.
        apart: engines have processes of their own, so that only more starts tell more.
        clock: seconds.
    """

    precision: float
    minutes: float
    starts: int
    apart: bool
    clock: Callable[[], float] = time.monotonic
    begin: float | None = None

    def ready(self) -> None:
        """The first engines are ready: time counts from here, and no later call changes that."""
        if self.begin is None:
            self.begin = self.clock()

    def spent(self) -> float:
        """Minutes so far."""
        return 0.0 if self.begin is None else (self.clock() - self.begin) / 60

    def unfinished(self, ratios: Ratios, start: int, rounds: int) -> list[str]:
        """The workloads that need more pairs from this start; empty if it is over.

        A workload is through with a start when all of its intervals are as narrow as they need be
        by then, so that they are narrow enough with the last start.

        Args:
            ratios: of all starts so far.
            start: the number of this start, from 1.
            rounds: measured in this start.
        """
        if rounds < 2 or rounds % 2:
            return list(ratios)  # the order of a pair must not count
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
        """Why the run ends with this start, `PRECISE` or `TIME_OVER`; None for another start.

        Args:
            ratios: of all starts so far.
            start: the number of this start.
            seconds: that it took to start the engines, as it will again.
        """
        precise = all(r.within(self.precision) for found in ratios.values() for r in found)
        if precise and start >= self.starts:
            return PRECISE
        if self.spent() + seconds / 60 < self.minutes:
            return None
        return PRECISE if precise else TIME_OVER
