"""Comparison of two runs: better, worse, or not distinguishable."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sleb_bench.tables import with_interval
from sleb_serve.utils.markdown import table

Report = Mapping[str, Any]
REGRESSION = "regression"
_VERDICTS = {-1: REGRESSION, 0: "no difference shown", 1: "improvement"}


@dataclass(frozen=True)
class Change:
    """Change of a ratio between two runs: B's over A's, with its interval."""

    workload: str
    pair: str
    before: str
    after: str
    change: float
    interval: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        """Return the verdict by whether the interval contains 1."""
        if self.interval is None:
            return "one sample: no verdict"
        return _VERDICTS[(self.interval[0] > 1) - (self.interval[1] < 1)]


def compare(before: Report, after: Report) -> list[Change]:
    """Compare the ratios of both runs; each is pruned over dense within its own run.

    The interval adds the two runs' logarithmic widths in quadrature, as for independent errors;
    with few starts this is slightly too wide.
    """
    known = {(w, r["variant"], r["over"]): r for w, r in _ratios(before)}
    found = []
    for workload, ratio in _ratios(after):
        old = known.get((workload, ratio["variant"], ratio["over"]))
        if old is None:
            continue
        change = ratio["ratio"] / old["ratio"]
        widths = [_width(old), _width(ratio)]
        interval = None
        if None not in widths:
            half = math.hypot(*(width or 0.0 for width in widths))
            interval = (change * math.exp(-half), change * math.exp(half))
        found.append(
            Change(
                workload,
                f"{ratio['variant']} / {ratio['over']}",
                with_interval(old["ratio"], old["ratio_interval"]),
                with_interval(ratio["ratio"], ratio["ratio_interval"]),
                change,
                interval,
            )
        )
    return found


def comparison(before: Report, after: Report, names: tuple[str, str]) -> tuple[str, bool]:
    """Return the comparison in Markdown, and whether anything got worse."""
    changes = compare(before, after)
    rows = [("workload", "ratio", names[0], names[1], "change (95 % interval)", "verdict")]
    for c in changes:
        change = with_interval(c.change, c.interval)
        rows.append((c.workload, c.pair, c.before, c.after, change, c.verdict))
    lines = table(rows) if changes else ["The two runs have no workload and variant in common."]
    for key in ("cpu", "cores", "gpus"):
        old, new = before["machine"].get(key), after["machine"].get(key)
        if old != new:
            lines += ["", f"Not the same machine ({key}): {old} and {new}."]
    for name, workload in after["workloads"].items():
        old = before["workloads"].get(name, workload)
        if old["size"] != workload["size"]:
            lines += ["", f"Not the same {name}: {old['size']}, and {workload['size']}."]
    if before["weights_sha256"] != after["weights_sha256"]:
        lines += ["", "Not the same model."]
    return "\n".join(lines) + "\n", any(c.verdict == REGRESSION for c in changes)


def _ratios(report: Report) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, workload in report["workloads"].items():
        for ratio in workload["ratios"]:
            yield name, ratio
    for key in ("saturation", "goodput"):
        for ratio in (report["serving"] or {}).get(key, {}).get("ratios", ()):
            yield f"serving, {key}", ratio


def _width(ratio: Mapping[str, Any]) -> float | None:
    """Return half the interval on the logarithmic scale."""
    if ratio["ratio_interval"] is None:
        return None
    low, high = ratio["ratio_interval"]
    return math.log(high / low) / 2
