"""Measure how often the benchmark's intervals contain 1 for equal engines on a busy machine.

Usage: busy.py MODEL M.json FOLDER [--runs 10] [--processes N] [--on S] [--off S] [OPTION…]. Each
run is `sleb-serve bench --beside dense OPTION…`: dense over dense, and pruned over dense. Other
processes meanwhile use all available CPU time in random bursts. Existing runs in FOLDER are kept.
Prints Markdown; SmolLM2 is at .cache/demo after `make demo`.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from sleb_bench.files import report_of
from sleb_bench.tables import with_interval
from sleb_serve.utils.markdown import table


def main() -> None:
    """Run the benchmark repeatedly under load; print whether the intervals contained 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("manifest", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--processes", type=int, default=1, help="that burn at once")
    parser.add_argument("--on", type=float, default=5, help="mean seconds that they burn")
    parser.add_argument("--off", type=float, default=10, help="mean seconds that they rest")
    options, more = parser.parse_known_args()
    for number in range(options.runs):
        folder = options.folder / str(number)
        if not (folder / "report.md").exists():
            with burning(options.processes, options.on, options.off, seed=number):
                _bench(options.model, options.manifest, folder, more)
    print("\n".join(summary([options.folder / str(number) for number in range(options.runs)])))


def _bench(model: str, manifest: Path, folder: Path, more: Sequence[str]) -> None:
    command = [
        *(sys.executable, "-m", "sleb_serve.cli", "bench", model, "-m", str(manifest)),
        *("-o", str(folder), "--beside", "dense", "--perplexity-sequences", "1"),
        *("--engine-args", '{"enforce_eager": true}', *more),
    ]
    code = subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode
    if code:
        raise SystemExit(f"busy.py: the benchmark ended with exit code {code}")


@contextmanager
def burning(processes: int, on: float, off: float, seed: int) -> Iterator[None]:
    """Run processes that use CPU time in bursts inside the context."""
    context = multiprocessing.get_context("spawn")
    burners = [
        context.Process(target=burn, args=(on, off, f"{seed} {number}"), daemon=True)
        for number in range(processes)
    ]
    for burner in burners:
        burner.start()
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.join()


def burn(on: float, off: float, seed: str) -> None:
    """Alternate random bursts of work and random pauses as long as the parent process lives."""
    source, parent = random.Random(seed), os.getppid()
    while os.getppid() == parent:
        time.sleep(source.expovariate(1 / off))
        end = time.monotonic() + source.expovariate(1 / on)
        while time.monotonic() < end:
            pass


def summary(folders: list[Path]) -> list[str]:
    """Return every run's ratios, and how often the interval for equal engines contains 1."""
    head = ("run", "workload", "ratio", "speed (95 %)", "processor time (95 %)", "disturbed pairs")
    rows: list[tuple[str, ...]] = [head]
    equals: dict[str, list[tuple[float, float]]] = {}
    widths: dict[str, list[float]] = {}
    for folder in folders:
        for name, ratio in _ratios(folder):
            pair = f"{ratio['variant']} / {ratio['over']}"
            pairs = ratio["pairs"]
            bad = f"{sum(p['disturbed'] for p in pairs)} of {len(pairs)}"
            speed = with_interval(ratio["ratio"], ratio["ratio_interval"])
            cpu = with_interval(ratio["cpu_ratio"], ratio["cpu_interval"])
            rows.append((folder.name, name, pair, speed, cpu, bad))
            for kind, interval in (("speed", "ratio_interval"), ("processor time", "cpu_interval")):
                key = f"{name}, {pair}, {kind}"
                low, high = ratio[interval]
                widths.setdefault(key, []).append(100 * (math.sqrt(high / low) - 1))
                if ratio["variant"] == "dense-again":
                    equals.setdefault(key, []).append((low, high))
    lines = [*table(rows), ""]
    for key, found in equals.items():
        held = sum(low <= 1 <= high for low, high in found)
        lines.append(f"- {key}: {held} of {len(found)} intervals hold 1")
    for key, values in widths.items():
        middle, most = median(values), max(values)
        lines.append(f"- {key}: intervals reach ±{middle:.1f} % (median), at most ±{most:.1f} %")
    return lines


def _ratios(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, workload in report_of(folder)["workloads"].items():
        for ratio in workload["ratios"]:
            yield name, ratio


if __name__ == "__main__":
    main()
