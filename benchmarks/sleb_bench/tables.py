"""A report as tables and lines, for Markdown or HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sleb_bench.ratios import ABOVE, Ratio

Report = Mapping[str, Any]
Row = tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """A titled table with notes; ``rows[0]`` is its header; may have only notes."""

    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    picture: str | None = None


def title(report: Report) -> str:
    """Describe the model and its removed blocks."""
    counts = sorted({v["blocks"] for v in report["variants"].values()} - {0})
    removed = ", ".join(map(str, counts)) or "none"
    return f"{report['model']}: {removed} of {report['num_blocks']} blocks removed"


def sections(report: Report) -> list[Section]:
    """Return all sections of a report, most important first."""
    found = []
    if report["failures"]:
        found.append(Section("Broken off", (), tuple(report["failures"])))
    if report["workloads"]:
        found.append(_throughput(report))
    if report["serving"]:
        found += _serving(report)
    if report["slo"]:
        found.append(_slo(report))
    found.append(_variants(report))
    found.append(_setting(report))
    return found


def with_interval(value: float, interval: Sequence[float] | None) -> str:
    """Format a ratio and its interval."""
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
        efficiency_cell(ratio),
    )


def efficiency_cell(ratio: Mapping[str, Any]) -> str:
    """Describe the gain that the interval shows."""
    if ratio["efficiency"] is not None:
        low, high = (100 * edge for edge in ratio["efficiency_interval"])
        return f"{100 * ratio['efficiency']:.0f} % ({low:.0f} to {high:.0f})"
    if ratio["efficiency_at_least"] is not None:
        return f"at least {100 * ratio['efficiency_at_least']:.0f} %, {ratio['verdict']}"
    return str(ratio["verdict"] or "")


_NO_RATIO = ("", "", "", "")


def _throughput(report: Report) -> Section:
    head = ("workload", "variant", "tokens/s", "CPU ms/token", "over", "ratio (95 % interval)")
    rows: list[Row] = [(*head, "ideal", "efficiency", "CPU ratio (95 % interval)")]
    notes = []
    for name, workload in report["workloads"].items():
        for variant, value in workload["throughput"].items():
            own = [ratio for ratio in workload["ratios"] if ratio["variant"] == variant]
            used = _number(workload["cpu_per_token"][variant], ".3g", 1000)
            for number, ratio in enumerate(own or [None]):
                values = ("", "") if number else (f"{value:.1f}", used)
                cells = (*_NO_RATIO, "") if ratio is None else (*_ratio_cells(ratio), _cpu(ratio))
                rows.append((name, variant, *values, *cells))
        notes.append(f"{name}: {workload['size']}; {workload['unit']}{_outside(workload)}")
        if workload["cost_per_million"] is not None:
            notes.append(f"{name}, cost of a million tokens: {_costs(workload)}")
        notes += filter(None, (_pairs_note(name, ratio) for ratio in workload["ratios"]))
        if any(ratio["verdict"] == ABOVE for ratio in workload["ratios"]):
            notes.append(f"{name}, above ideal: {_ABOVE}")
    notes += [*_end_notes(report), _HOW]
    return Section("Throughput", tuple(rows), tuple(notes), "throughput")


_HOW = (
    "Ratio: Hodges-Lehmann estimate over pairs of neighbouring turns; interval: jackknife over "
    "blocks of neighbouring pairs, or over starts where that is said. CPU ratio: the same, of "
    "tokens per processor second; threads that spin while they wait count. tokens/s: median turn"
)
_ABOVE = "one of 20 intervals misses the truth, and the ideal counts weights only; measure longer"


def _costs(workload: Mapping[str, Any]) -> str:
    """Format costs in the price's currency, for the workload's counted tokens."""
    costs = workload["cost_per_million"].items()
    return ", ".join(f"{variant} {cost:.3g}" for variant, cost in costs)


def _cpu(ratio: Mapping[str, Any]) -> str:
    if ratio["cpu_ratio"] is None:
        return ""
    return with_interval(ratio["cpu_ratio"], ratio["cpu_interval"])


def _outside(workload: Mapping[str, Any]) -> str:
    """Describe the share of the dense time that pruning does not reduce."""
    outside = workload["outside_blocks"]
    if outside is None:
        return ""
    by_weights = outside["by_weights"]
    weights = "" if by_weights is None else f" (by weights {100 * by_weights:.0f} %)"
    interval = outside["interval"]
    if interval is None or tuple(interval) == (0.0, 1.0):
        return f"; outside the blocks: not told{weights}"
    low, high = (100 * edge for edge in interval)
    share = f"{low:.0f} to {high:.0f}" if low else f"at most {high:.0f}"
    return f"; outside the blocks {share} % of the dense time{weights}"


def _pairs_note(workload: str, ratio: Mapping[str, Any]) -> str:
    """Describe the number of pairs and their conditions."""
    pairs = ratio["pairs"]
    starts, bad = len({pair["start"] for pair in pairs}), sum(p["disturbed"] for p in pairs)
    text = f"{workload}, {ratio['variant']} / {ratio['over']}: {len(pairs)} pairs"
    text += f" in {starts} starts" if starts > 1 else " in one start"
    if ratio["samples"] == "starts":
        alone = "; processes of their own, and what starts differ by is not in the interval"
        text += "; interval over starts" if ratio["count"] > 1 else alone
    if bad:
        text += f"; {bad} disturbed: over 5 % of the machine went elsewhere, or the clock changed"
    if ratio["quiet_ratio"] is not None:
        quiet = with_interval(ratio["quiet_ratio"], ratio["quiet_interval"])
        text += f"; without those {quiet}"
    return text


def _end_notes(report: Report) -> list[str]:
    """Describe why the turns ended, and intervals wider than requested."""
    end, options = report["end"], report["options"]
    if end is None:
        return []
    goal = options["precision"]
    wide = [
        f"{name} {ratio['variant']} / {ratio['over']} ({_width(ratio)})"
        for name, workload in report["workloads"].items()
        for ratio in workload["ratios"]
        if not Ratio(
            ratio["ratio"], ratio["ratio_interval"], ratio["samples"], ratio["count"]
        ).within(goal / 100)
    ]
    spent = f"{end['minutes']:.1f} of {options['minutes']:g} minutes"
    text = f"Ended after {spent}, {end['starts']} start{'s' if end['starts'] > 1 else ''}"
    if not wide:
        return [f"{text}: every interval reaches {goal:g} % or less to a side"]
    return [f"{text}: time over. Wider than {goal:g} % to a side: {', '.join(wide)}"]


def _width(ratio: Mapping[str, Any]) -> str:
    if ratio["ratio_interval"] is None:
        return "one sample"
    low, high = ratio["ratio_interval"]
    return f"{100 * (math.sqrt(high / low) - 1):.1f} %"


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
    dataset = options.get("dataset")
    prompts = f"prompts of {dataset}" if dataset else f"{options['input_length']} tokens in"
    notes = (
        f"{options['requests']} requests a point, {prompts}, "
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
        Section("Serving: what it gains", tuple(gains), _gain_notes(serving), "pareto"),
        Section("Serving, load by load", tuple(rows), notes, "latency"),
    ]


def _gain_notes(serving: Mapping[str, Any]) -> tuple[str, ...]:
    if serving["cost_per_million"] is None:
        return ()
    return (f"cost of a million generated tokens at saturation: {_costs(serving)}",)


def _edges(low: float | None, high: float | None) -> str:
    """Return what a ratio lies between; the search may have found neither limit."""
    if low is None and high is None:
        return ""
    if high is None:
        return f" (at least {low:.3f})"
    return f" (at most {high:.3f})" if low is None else f" ({low:.3f} to {high:.3f})"


def _slo(report: Report) -> Section:
    """Return a table of the highest rates that met the service level."""
    slo = report["slo"]
    rows: list[Row] = [("variant", "requests/s", "not at", "over", "ratio (between)")]
    for name, found in slo["variants"].items():
        gain = next((ratio for ratio in slo["ratios"] if ratio["variant"] == name), None)
        cells: Row = ("", "")
        if gain is not None:
            cells = (gain["over"], f"{gain['ratio']:.3f}{_edges(*gain['between'])}")
        rate = _number(found["rate"], ".3g") or "none tried"
        over = "its capacity" if found["at_capacity"] else _number(found["not_at"], ".3g")
        rows.append((name, rate, over, *cells))
    limits = ", ".join(f"{name} {limit:g} ms" for name, limit in slo["limits"].items())
    requests = f"{100 * slo['share']:.0f} % of {report['options']['serving']['requests']} requests"
    note = (
        f"The highest rate tried at which {requests} met {limits}, and the lowest at which fewer "
        f"did. A server's capacity, its throughput with all requests at once, is the highest rate "
        f"tried. The ratio lies between those of the two; prefix cache hits "
        f"{100 * slo['prefix_cache_hit_rate']:.1f} % at most"
    )
    return Section("Highest rate within the service level", tuple(rows), (note,))


def load_name(point: Mapping[str, Any]) -> str:
    """Describe a point of the ladder."""
    if point["max_concurrency"] is not None:
        return f"{point['max_concurrency']} in flight"
    rate = point["request_rate"]
    return "all at once" if rate == "inf" else f"{rate:g} requests/s"


def _variants(report: Report) -> Section:
    rows: list[Row] = [
        (
            *("variant", "blocks removed", "weights, MB", "ready, s", "resident, MB"),
            *("KV cache, tokens", "longest at once", "perplexity", "verdict"),
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
                _verdict(variant),
            )
        )
    tags = ", ".join(
        f"{name} is {variant['pruning_digest'][:8]}"
        for name, variant in report["variants"].items()
        if variant["pruning_digest"] and variant["over"] == "dense" and "-" not in name
    )
    notes = [f"Digests of the prunings: {tags}"]
    if any(_verdict(variant) == _NOT_EVALUATED for variant in report["variants"].values()):
        notes.append(
            f"{_NOT_EVALUATED}: `sleb-serve eval --write-back` puts a verdict on quality "
            "into the manifest"
        )
    if any(variant["perplexity"] is not None for variant in report["variants"].values()):
        notes.append(f"Perplexity: {report['quality_text']}")
    return Section("Start, memory, quality", tuple(rows), tuple(notes), "frontier")


_NOT_EVALUATED = "not evaluated"


def _verdict(variant: Mapping[str, Any]) -> str:
    """Return the verdict in the manifest; empty for the dense model and older records."""
    return variant["verdict"] or _NOT_EVALUATED if "verdict" in variant else ""


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
