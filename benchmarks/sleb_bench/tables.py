"""A report as tables and lines, to be written as Markdown or as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Report = Mapping[str, Any]
Row = tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """A titled table with notes below; ``rows[0]`` is its head; no rows, only notes."""

    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    picture: str | None = None


def title(report: Report) -> str:
    """The model and what was removed of it."""
    counts = sorted({v["blocks"] for v in report["variants"].values()} - {0})
    removed = ", ".join(map(str, counts)) or "none"
    return f"{report['model']}: {removed} of {report['num_blocks']} blocks removed"


def sections(report: Report) -> list[Section]:
    """Everything a report says, the most important first."""
    found = []
    if report["failures"]:
        found.append(Section("Broken off", (), tuple(report["failures"])))
    if report["workloads"]:
        found.append(_throughput(report))
    if report["serving"]:
        found += _serving(report)
    found.append(_variants(report))
    found.append(_setting(report))
    return found


def with_interval(value: float, interval: Sequence[float] | None) -> str:
    """A ratio and its interval."""
    if interval is None:
        return f"{value:.3f} (one sample)"
    return f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def _number(value: float | None, form: str = ".1f", scale: float = 1) -> str:
    return "" if value is None else format(value * scale, form)


def _ratio_cells(ratio: Mapping[str, Any]) -> Row:
    return (
        str(ratio["over"]),
        with_interval(ratio["ratio"], ratio["ratio_interval"]),
        _number(ratio["ideal"], ".3f"),
        _efficiency(ratio),
    )


def _efficiency(ratio: Mapping[str, Any]) -> str:
    if ratio["efficiency"] is None:
        return ""
    text = f"{100 * ratio['efficiency']:.0f} %"
    if ratio["efficiency_interval"] is None:
        return text
    low, high = (100 * edge for edge in ratio["efficiency_interval"])
    return f"{text} ({low:.0f} to {high:.0f})"


_NO_RATIO = ("", "", "", "")


def _throughput(report: Report) -> Section:
    rows: list[Row] = [
        ("workload", "variant", "tokens/s", "over", "ratio (95 % interval)", "ideal", "efficiency")
    ]
    notes = []
    for name, workload in report["workloads"].items():
        for variant, value in workload["throughput"].items():
            own = [ratio for ratio in workload["ratios"] if ratio["variant"] == variant]
            for number, ratio in enumerate(own or [None]):
                first = (name, variant, f"{value:.1f}") if not number else (name, variant, "")
                rows.append((*first, *(_NO_RATIO if ratio is None else _ratio_cells(ratio))))
        line = f"{name}: {workload['size']}; {workload['unit']}"
        outside = workload["outside_blocks"]
        if outside is not None:
            least, most = min(outside["starts"]), max(outside["starts"])
            line += (
                f"; outside the blocks {100 * outside['measured']:.0f} % of the dense time, "
                f"{100 * least:.0f} to {100 * most:.0f} % by start"
            )
            if outside["by_weights"] is not None:
                line += f" (by weights {100 * outside['by_weights']:.0f} %)"
        notes.append(line)
    options = report["options"]
    how = "one engine at a time" if options["one_at_a_time"] else "engines side by side, in turns"
    notes.append(f"{options['starts']} starts of {options['rounds']} rounds, {how}")
    return Section("Throughput", tuple(rows), tuple(notes), "throughput")


def _serving(report: Report) -> list[Section]:
    serving = report["serving"]
    rows: list[Row] = [
        (
            *("load", "variant", "tokens/s", "requests/s", "goodput"),
            *(f"{name} p{p}, ms" for name in ("TTFT", "TPOT", "E2E") for p in (50, 99)),
            "failed",
        )
    ]
    for point in serving["points"]:
        for name, values in point["variants"].items():
            latencies = [
                _number(values.get(f"p{p}_{key}_ms"), ".0f")
                for key in ("ttft", "tpot", "e2el")
                for p in (50, 99)
            ]
            rows.append(
                (
                    load_name(point),
                    name,
                    f"{values['output_throughput']:.1f}",
                    f"{values['request_throughput']:.2f}",
                    f"{values['request_goodput']:.2f}",
                    *latencies,
                    str(values["failed"]),
                )
            )
    slo = ", ".join(f"{name} {limit:g} ms" for name, limit in serving["slo"].items())
    hits = [v["prefix_cache_hit_rate"] for p in serving["points"] for v in p["variants"].values()]
    options = report["options"]["serving"]
    notes = (
        f"{options['requests']} requests a point, {options['input_length']} tokens in, "
        f"{options['output_length']} out, {options['rounds']} rounds; goodput: requests/s within "
        f"{slo}; prefix cache hits {100 * max(hits):.1f} % at most",
    )
    gains: list[Row] = [
        ("", "variant", "best", "over", "ratio (95 % interval)", "ideal", "efficiency")
    ]
    for key, text in (("saturation", "tokens/s at saturation"), ("goodput", "goodput, requests/s")):
        for name, value in serving[key]["best"].items():
            own = [ratio for ratio in serving[key]["ratios"] if ratio["variant"] == name]
            for number, ratio in enumerate(own or [None]):
                first = (text, name, f"{value:.2f}" if not number else "")
                gains.append((*first, *(_NO_RATIO if ratio is None else _ratio_cells(ratio))))
    return [
        Section("Serving: what it gains", tuple(gains)),
        Section("Serving, load by load", tuple(rows), notes, "latency"),
    ]


def load_name(point: Mapping[str, Any]) -> str:
    """A point of the ladder in words."""
    if point["max_concurrency"] is not None:
        return f"{point['max_concurrency']} in flight"
    rate = point["request_rate"]
    return "all at once" if rate == "inf" else f"{rate:g} requests/s"


def _variants(report: Report) -> Section:
    rows: list[Row] = [
        (
            *("variant", "blocks removed", "weights, MB", "ready, s", "resident, MB"),
            *("KV cache, tokens", "longest at once", "perplexity"),
        )
    ]
    for name, variant in report["variants"].items():
        rows.append(
            (
                name,
                str(variant["blocks"]),
                _number(variant["weights_bytes"], ".0f", 1e-6),
                _number(variant["startup_time"], ".1f"),
                _number(variant["memory_bytes"], ".0f", 1e-6),
                _number(variant["kv_cache_tokens"], ".0f"),
                _number(variant["max_concurrency"], ".1f"),
                _number(variant["perplexity"], ".2f"),
            )
        )
    tags = ", ".join(
        f"{name} is {variant['pruning_digest'][:8]}"
        for name, variant in report["variants"].items()
        if variant["pruning_digest"] and variant["over"] == "dense" and "-" not in name
    )
    notes = [f"Digests of the prunings: {tags}"]
    if any(variant["perplexity"] is not None for variant in report["variants"].values()):
        notes.append(f"Perplexity: {report['quality_text']}")
    return Section("Start, memory, quality", tuple(rows), tuple(notes), "frontier")


def _setting(report: Report) -> Section:
    machine = report["machine"]
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items())
    gpus = ", ".join(
        f"{gpu['name']} (driver {gpu['driver_version']}, SM clock {gpu['clocks.current.sm']})"
        for gpu in machine["gpus"]
    )
    place = gpus or f"{machine['cpu']}, {machine['cores']} cores"
    return Section(
        "How it was measured",
        (),
        (f"{place}; Python {machine['python']}, {versions}", f"`{report['command']}`"),
    )
