"""Measure how much two equal, neighbouring turns differ on this machine, by their length.

Usage: noise.py OUTPUT.json [--seconds 60]. Runs the matrix products of one small model's generation
step again and again. OUTPUT gets the seconds of each call; turns of several lengths are made of
them. Prints Markdown. Choose a turn's length (`sleb_bench.pace.TURN`) by the last column.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev

import torch

from sleb_serve.utils.markdown import table

PAIRS = 8
"""Fewest pairs of a row."""


def main() -> None:
    """Measure, and print a row for each length of turns."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    times = measure(options.seconds)
    options.output.write_text(json.dumps([round(seconds, 5) for seconds in times]) + "\n")
    print("\n".join(table(rows(times))))


def measure(seconds: float) -> list[float]:
    """Return the time of each call."""
    weights = [torch.randn(576, 1536, dtype=torch.bfloat16) for _ in range(150)]
    states = torch.randn(8, 576, dtype=torch.bfloat16)
    times: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        begin = time.perf_counter()
        for weight in weights * 5:
            states @ weight
        times.append(time.perf_counter() - begin)
    return times[1:]


def rows(times: Sequence[float]) -> list[tuple[str, ...]]:
    """Return the scatter of pairs of neighbouring turns of 1, 2, 4, … calls."""
    found: list[tuple[str, ...]] = [
        ("turn, s", "pairs", "standard deviation of a pair", "standard error of the mean")
    ]
    calls = 1
    while (pairs := len(times) // (2 * calls)) >= PAIRS:
        turns = [sum(times[i * calls : (i + 1) * calls]) for i in range(2 * pairs)]
        logs = [math.log(turns[2 * i] / turns[2 * i + 1]) for i in range(pairs)]
        each = pstdev(logs)
        cells = (f"{100 * each:.1f} %", f"{100 * each / math.sqrt(pairs):.1f} %")
        found.append((f"{fmean(turns):.2f}", str(pairs), *cells))
        calls *= 2
    return found


if __name__ == "__main__":
    main()
