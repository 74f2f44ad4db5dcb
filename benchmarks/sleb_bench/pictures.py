"""Plots of a report: throughput bars, latency over load, quality over speed."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from sleb_bench.tables import load_name
from sleb_bench.variants import DENSE, is_beside
from sleb_serve.evaluation.picture import accuracy

Report = Mapping[str, Any]
_DPI = 130


def pictures(report: Report) -> dict[str, bytes]:
    """Return PNG plots by name, for the data in the report."""
    import matplotlib

    matplotlib.use("Agg")
    found = {}
    if report["workloads"]:
        found["throughput"] = _throughput(report)
    if report["serving"] and len(report["serving"]["points"]) > 1:
        found["latency"] = _latency(report)
        found["pareto"] = _pareto(report)
    speeds = _speeds(report)
    if len(speeds) > 1:
        found["frontier"] = _frontier(report, speeds)
    return found


def png(figure: Any) -> bytes:
    """Render a figure to file content, and close it."""
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    pyplot.close(figure)
    return buffer.getvalue()


def subplots(count: int, width: float, height: float) -> tuple[Any, Sequence[Any]]:
    """Create a figure with panels side by side, with the given size in inches."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, count, figsize=(width * count, height), squeeze=False, layout="constrained"
    )
    return figure, axes[0]


def _throughput(report: Report) -> bytes:
    """Plot a panel per workload: bars, the ratio and its interval, and the ideal as a tick."""
    workloads = report["workloads"]
    names = list(report["variants"])
    figure, axes = subplots(len(workloads), max(3.6, 0.9 * len(names) + 1.2), 4.2)
    for axis, (title, workload) in zip(axes, workloads.items(), strict=True):
        shown = [name for name in names if name in workload["throughput"]]
        values = [workload["throughput"][name] for name in shown]
        colors = [f"C{report['variants'][name]['blocks'] % 10}" for name in shown]
        axis.bar(range(len(shown)), values, color=colors, alpha=0.75)
        ceiling = max(values)
        for place, name in enumerate(shown):
            ratio = next((r for r in workload["ratios"] if r["variant"] == name), None)
            if ratio is None:
                continue
            under = workload["throughput"][ratio["over"]]
            top = max(values[place], under * ratio["ratio"])
            if ratio["ratio_interval"] is not None:
                low, high = (under * edge for edge in ratio["ratio_interval"])
                axis.plot([place, place], [low, high], color="black", linewidth=1.5)
            if ratio["ideal"] is not None:
                level = under * ratio["ideal"]
                axis.plot([place - 0.4, place + 0.4], [level, level], color="red", linestyle=":")
                top = max(top, level)
            ceiling = max(ceiling, top)
            axis.annotate(
                f"{ratio['ratio']:.2f}x",
                (place + 0.05, top),
                (0, 3),
                textcoords="offset points",
                ha="left",
                fontsize="small",
            )
        # The interval of a few noisy starts may be very wide, so clip it instead of the bars.
        axis.set_ylim(0, 1.3 * ceiling)
        axis.set_xticks(range(len(shown)), shown, rotation=30, ha="right")
        axis.set_title(title)
        axis.set_ylabel(workload["unit"])
    figure.suptitle("Line: 95 % interval of the ratio. Dotted: ideal.", fontsize="small")
    return png(figure)


def _latency(report: Report) -> bytes:
    """Plot TTFT, TPOT and throughput over the offered load."""
    points = report["serving"]["points"]
    labels = [load_name(point) for point in points]
    panels = (
        ("TTFT, ms", "ttft"),
        ("TPOT, ms", "tpot"),
        ("generated tokens/s", "output_throughput"),
    )
    figure, axes = subplots(len(panels), 5.0, 4.6)
    names = [name for name in report["variants"] if any(name in p["variants"] for p in points)]
    for axis, (label, key) in zip(axes, panels, strict=True):
        for number, name in enumerate(names):
            places = [i for i, point in enumerate(points) if name in point["variants"]]
            of = [points[i]["variants"][name] for i in places]
            if key == "output_throughput":
                axis.plot(places, [v[key] for v in of], marker="o", color=f"C{number}", label=name)
                continue
            for p, style in ((50, "-"), (99, ":")):
                axis.plot(
                    places,
                    [values[f"p{p}_{key}_ms"] for values in of],
                    style,
                    marker="o",
                    color=f"C{number}",
                    label=f"{name}, p{p}",
                )
        if key != "output_throughput":
            axis.set_yscale("log")
        axis.set_ylabel(label)
        axis.set_xticks(range(len(points)), labels, rotation=30, ha="right")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    return png(figure)


def _pareto(report: Report) -> bytes:
    """Plot what all users get together over what each one gets, load by load."""
    serving = report["serving"]
    gpus = serving["gpus"]
    figure, (axis,) = subplots(1, 6.4, 4.6)
    for number, name in enumerate(report["variants"]):
        found = []
        for point in serving["points"]:
            values = point["variants"].get(name, {})
            if values.get("p50_tpot_ms"):
                rate = values["output_throughput"] / (gpus or 1)
                found.append((1000 / values["p50_tpot_ms"], rate, load_name(point)))
        if not found:
            continue
        found.sort()
        users, together, _ = zip(*found, strict=True)
        axis.plot(users, together, marker="o", color=f"C{number}", label=name)
        for *place, load in found:
            axis.annotate(
                load,
                place,
                (4, 4),
                textcoords="offset points",
                color=f"C{number}",
                fontsize="x-small",
            )
    axis.set_xlabel("generated tokens/s of each user (1 / median TPOT)")
    axis.set_ylabel(f"generated tokens/s of a {'GPU' if gpus else 'server'}")
    axis.margins(0.15)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    return png(figure)


def _speeds(report: Report) -> dict[int, float]:
    """Return the speed-up by blocks removed, of generation if measured."""
    for name in ("decode", "official-generation", "saturated", "prefill", "official-prompt"):
        if name in report["workloads"]:
            ratios = report["workloads"][name]["ratios"]
            own = {
                report["variants"][r["variant"]]["blocks"]: r["ratio"]
                for r in ratios
                if r["over"] == DENSE and not is_beside(r["variant"])
            }
            return {0: 1.0, **own}
    return {}


def _frontier(report: Report, speeds: Mapping[int, float]) -> bytes:
    """Plot perplexity, and accuracy if evaluated, over measured speed."""
    accuracies = _accuracies(report, speeds)
    figure, axes = subplots(2 if accuracies else 1, 5.2, 4.4)
    perplexity = {
        variant["blocks"]: variant["perplexity"]
        for name, variant in report["variants"].items()
        if variant["perplexity"] is not None and not is_beside(name)
    }
    panels = [("perplexity, held out", perplexity)]
    panels += [("accuracy, mean of the tasks", accuracies)] if accuracies else []
    for axis, (label, values) in zip(axes, panels, strict=True):
        counts = [count for count in speeds if count in values]
        axis.plot([speeds[k] for k in counts], [values[k] for k in counts], marker="o")
        for count in counts:
            axis.annotate(
                f"{count} removed" if count else "dense",
                (speeds[count], values[count]),
                (-6, 6),
                textcoords="offset points",
                ha="right",
                fontsize="small",
            )
        axis.set_xlabel("speed-up over dense, measured")
        axis.set_ylabel(label)
        axis.margins(0.18)
        axis.grid(alpha=0.3)
    return png(figure)


def _accuracies(report: Report, speeds: Mapping[int, float]) -> dict[int, float]:
    """Return the mean accuracy by blocks removed, from the manifest's evaluation."""
    for evaluation in report["evaluation"].values():
        found = {}
        try:
            for result in evaluation.get("results", []):
                tasks = [accuracy(values)[0] for values in result.get("tasks", {}).values()]
                if tasks and result["blocks"] in speeds:
                    found[result["blocks"]] = sum(tasks) / len(tasks)
        except (AttributeError, KeyError, TypeError, StopIteration):
            continue  # this part of a manifest is free-form: other programs may use it
        if len(found) > 1:
            return found
    return {}
