"""Plot of perplexity and accuracy over blocks removed, with the ideal speed-up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from sleb_serve.utils.atomic_io import whole_file
from sleb_serve.utils.outputs import beginning_with

PICTURE = beginning_with("a picture", rb"\x89PNG\r\n\x1a\n")


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw an evaluation's report as a PNG.

    Raises:
        SlebError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results: Sequence[Mapping[str, Any]] = report["results"]
    texts = list(results[0]["perplexity"])
    tasks = list(results[0]["tasks"])
    panels = ([texts] if texts else []) + ([tasks] if tasks else [])
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4.8), squeeze=False, layout="constrained"
    )
    blocks = [entry["blocks"] for entry in results]
    for names, axis in zip(panels, axes[0], strict=True):
        if names is texts:
            for text in texts:
                values = [entry["perplexity"][text] for entry in results]
                axis.plot(blocks, values, marker="o", label=Path(text).name)
            axis.set_ylabel("perplexity")
        else:
            _accuracies(axis, blocks, tasks, results)
        axis.set_xlabel("blocks removed")
        axis.set_xticks(blocks)
        axis.grid(alpha=0.3)
        # At the bottom, away from the lines.
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
        _speeds(axis, blocks, [entry["ideal_speedup"] for entry in results])
    figure.suptitle(f"{report['model']['id']}, {report['model']['num_blocks']} blocks")
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    pyplot.close(figure)


def accuracy(values: Mapping[str, float]) -> tuple[float, float]:
    """Return a task's accuracy (normalised if there is no other) and its standard error."""
    metric = next((name for name in ("acc", "exact_match", "acc_norm") if name in values), None)
    if metric is None:
        metric = next(name for name in values if "_stderr" not in name)
    return values[metric], values.get(f"{metric}_stderr", 0.0)


def _accuracies(
    axis: Any, blocks: Sequence[int], tasks: Sequence[str], results: Sequence[Mapping[str, Any]]
) -> None:
    means = []
    for task in tasks:
        pairs = [accuracy(entry["tasks"][task]) for entry in results]
        axis.errorbar(
            blocks,
            [value for value, _ in pairs],
            yerr=[error for _, error in pairs],
            marker="o",
            capsize=2,
            alpha=0.6,
            label=task,
        )
        means.append([value for value, _ in pairs])
    if len(tasks) > 1:
        mean = [fmean(values) for values in zip(*means, strict=True)]
        axis.plot(blocks, mean, color="black", linewidth=2.5, label="mean")
    axis.set_ylabel("accuracy (bars: standard error)")


def _speeds(axis: Any, blocks: Sequence[int], speeds: Sequence[float]) -> None:
    """Add the ideal speed-up of each number of blocks along the top."""
    top = axis.secondary_xaxis("top")
    top.set_xticks(blocks, [f"{speed:.2f}x" for speed in speeds])
    top.set_xlabel("ideal speed-up")
