"""Measure how often the interval for equal engines contains 1, by splitting a long run.

Usage: split.py DIR [--starts 3]. DIR is a run of `sleb-serve bench --beside dense` (and perhaps
export) with many starts. Its starts are split into short runs, each is reported separately, and the
intervals of equal pairs are counted. Prints Markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sleb_bench.files import read_records
from sleb_bench.report import make_report
from sleb_bench.tables import with_interval
from sleb_serve.utils.markdown import table


def main() -> None:
    """Print each short run's ratio of equal engines, and how many intervals contain 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--starts", type=int, default=3)
    options = parser.parse_args()
    records = read_records(options.folder)
    starts = sorted({record["start"] for record in records if "start" in record})
    runs = [
        starts[i : i + options.starts]
        for i in range(0, len(starts) - options.starts + 1, options.starts)
    ]
    rows = [("workload", "pair", f"run of {options.starts} starts", "ratio (95 %)", "holds 1")]
    held: dict[tuple[str, str], list[bool]] = {}
    for number, run in enumerate(runs, 1):
        for workload, ratio in equals(records, run):
            low, high = ratio["ratio_interval"]
            pair = f"{ratio['variant']} / {ratio['over']}"
            held.setdefault((workload, pair), []).append(low <= 1 <= high)
            answer = "yes" if low <= 1 <= high else "no"
            interval = with_interval(ratio["ratio"], ratio["ratio_interval"])
            rows.append((workload, pair, str(number), interval, answer))
    print("\n".join(table(rows)), "\n")
    for (workload, pair), answers in held.items():
        print(f"- {workload}, {pair}: {sum(answers)} of {len(answers)} intervals hold 1")
    for workload, ratio in equals(records, starts):
        whole = with_interval(ratio["ratio"], ratio["ratio_interval"])
        print(
            f"- {workload}, {ratio['variant']} / {ratio['over']}, all {len(starts)} starts: {whole}"
        )


def equals(records: list[dict[str, Any]], starts: list[int]) -> list[tuple[str, dict[str, Any]]]:
    """Return the ratios of equal variants from some of the starts."""
    kept = [record for record in records if record.get("start", starts[0]) in starts]
    return [
        (name, ratio)
        for name, workload in make_report(kept)["workloads"].items()
        for ratio in workload["ratios"]
        if ratio["variant"] in {"dense-again"} or ratio["variant"].endswith("-export")
    ]


if __name__ == "__main__":
    main()
