"""Simulate the coverage of the benchmark's interval on quiet and busy machines.

Usage: intervals.py [--runs 300] [--seed 1]. Two engines with a known speed ratio take turns on a
machine with varying background load. The benchmark's own rules form pairs and stop runs:
`sleb_bench.pace` and `sleb_bench.ratios`. Prints Markdown.
"""

from __future__ import annotations

import argparse
import math
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np

from sleb_bench.pace import PRECISE, TURN, Pace, is_due
from sleb_bench.ratios import Ratio, paired_ratio
from sleb_serve.utils.markdown import table

TRUTH = 1.19
STARTING = 12.0
"""Seconds to start the engines."""
OTHER = 2 * TURN
"""Seconds of another workload's turns between two pairs."""


@dataclass(frozen=True)
class Machine:
    """Disturbances of the engines.

    Attributes:
        noise: standard deviation of a turn's log time on a quiet machine.
        on: mean seconds of a burst of background load; 0 for none.
        off: mean seconds between bursts.
        slower: maximum slow-down in a burst; at least 1.3.
        spikes: share of independent turns that take about 30 % longer.
        starts: standard deviation of the log ratio between starts.
        apart: whether engines have separate processes.
    """

    noise: float = 0.02
    on: float = 0.0
    off: float = 0.0
    slower: float = 1.0
    spikes: float = 0.0
    starts: float = 0.0
    apart: bool = False


MACHINES = {
    "quiet": Machine(),
    "noisy, 5 % a turn": Machine(noise=0.05),
    "noisy, 15 % a turn": Machine(noise=0.15),
    "spikes of 30 % in a tenth of the turns": Machine(noise=0.03, spikes=0.1),
    "bursts of 2 s, up to 6 times slower": Machine(0.03, 2, 6, 6),
    "bursts of 5 s, up to 3 times slower": Machine(0.03, 5, 10, 3),
    "bursts of 30 s, up to 3 times slower": Machine(0.03, 30, 60, 3),
    "the same, starts differ by 1 %": Machine(0.03, 30, 60, 3, starts=0.01),
    "the same, starts differ by 3 %": Machine(0.03, 30, 60, 3, starts=0.03),
    "processes of their own, starts differ by 6 %": Machine(
        0.03, 5, 10, 3, starts=0.06, apart=True
    ),
}


class Clock:
    """Clock of the simulated machine, where work takes longer during bursts."""

    def __init__(self, machine: Machine, source: np.random.Generator) -> None:
        self.now = 0.0
        self._machine, self._source = machine, source
        self._busy = machine.on > 0 and source.random() < machine.on / (machine.on + machine.off)
        self._until, self._speed = 0.0, 1.0

    def work(self, seconds: float) -> float:
        """Do work of the given quiet-machine seconds; return the actual seconds."""
        begin = self.now
        while seconds > 0:
            if self.now >= self._until:
                self._change()
            step = min(seconds / self._speed, self._until - self.now)
            self.now += step
            seconds -= step * self._speed
            if seconds < 1e-9:
                break
        return self.now - begin

    def _change(self) -> None:
        """Begin the next burst or quiet period."""
        machine = self._machine
        if not machine.on:
            self._until = math.inf
            return
        self._until = self.now + self._source.exponential(machine.on if self._busy else machine.off)
        self._speed = 1 / self._source.uniform(1.3, machine.slower) if self._busy else 1.0
        self._busy = not self._busy


@dataclass(frozen=True)
class Run:
    """Result of a simulated run."""

    found: Ratio
    pairs: int
    minutes: float
    precise: bool


def simulate(
    machine: Machine,
    source: np.random.Generator,
    *,
    precision: float = 0.02,
    minutes: float = 5.0,
    starts: int = 3,
) -> Run:
    """Simulate one run of the benchmark on a machine."""
    clock = Clock(machine, source)
    pace = Pace(precision, minutes, starts, machine.apart, lambda: clock.now)
    found: list[list[float]] = []
    while True:
        clock.work(STARTING)
        pace.ready()
        ratio = TRUTH * math.exp(source.normal(0, machine.starts))
        found.append([])
        judged = 0
        while True:
            found[-1].append(_pair(machine, clock, source, ratio, len(found[-1]) + 1))
            if is_due(len(found[-1]), judged):
                so_far, judged = {"": [paired_ratio(found, apart=machine.apart)]}, len(found[-1])
            if not pace.unfinished(so_far, len(found), len(found[-1])):
                break
            clock.work(OTHER)
        why = pace.verdict(so_far, len(found), STARTING)
        if why is not None:
            pairs = sum(map(len, found))
            return Run(so_far[""][0], pairs, clock.now / 60, why == PRECISE)


def _pair(
    machine: Machine, clock: Clock, source: np.random.Generator, ratio: float, number: int
) -> float:
    """Simulate a turn of each engine in changing order; return the ratio of speeds."""
    seconds = {}
    first = number % 4 in (1, 0)
    for work in (ratio, 1.0) if first else (1.0, ratio):
        noise = math.exp(source.normal(0, machine.noise))
        if source.random() < machine.spikes:
            noise *= 1 + source.exponential(0.3)
        seconds[work] = clock.work(TURN * work * noise)
    return seconds[ratio] / seconds[1.0]


def coverage(machine: Machine, runs: int, seed: int) -> list[Run]:
    """Simulate many runs on one kind of machine."""
    source = np.random.default_rng(seed)
    return [simulate(machine, source) for _ in range(runs)]


def holds(run: Run) -> bool:
    """Return whether its interval contains the true ratio."""
    assert run.found.interval is not None
    return run.found.interval[0] <= TRUTH <= run.found.interval[1]


def row(name: str, runs: int, seed: int) -> tuple[str, ...]:
    """Return one kind of machine's row of the table."""
    found = coverage(MACHINES[name], runs, seed)
    held = sum(map(holds, found)) / len(found)
    edges = [run.found.interval or (0.0, math.inf) for run in found]
    side = median(math.sqrt(high / low) - 1 for low, high in edges)
    pairs, minutes = median(r.pairs for r in found), median(r.minutes for r in found)
    return (name, f"{100 * held:.0f} %", f"±{100 * side:.1f} %", f"{pairs:.0f}", f"{minutes:.1f}")


def main() -> None:
    """Print the interval's coverage, its width, and the cost."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rows: list[tuple[str, ...]] = [
        ("machine", "interval holds the truth", "half-width", "pairs", "minutes")
    ]
    with ProcessPoolExecutor() as pool:
        for found in pool.map(partial(row, runs=options.runs, seed=options.seed), MACHINES):
            rows.append(found)
            print(" | ".join(found), file=sys.stderr, flush=True)
    print("\n".join(table(rows)))
    print(
        f"\n{options.runs} runs each, truth {TRUTH}; asked for: ±2 %, 5 minutes, 3 starts; medians."
    )


if __name__ == "__main__":
    main()
