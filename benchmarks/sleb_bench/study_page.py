"""A study's page: quality over measured speed, and the recommended depth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import compress
from pathlib import Path
from statistics import fmean
from typing import Any

from sleb_bench.markdown import markdown
from sleb_bench.page import page
from sleb_bench.pictures import png, subplots
from sleb_bench.tables import Row, Section, with_interval
from sleb_bench.variants import DENSE, is_beside
from sleb_serve.evaluation.picture import accuracy
from sleb_serve.evaluation.verdict import (
    HARMFUL_AGREEMENT,
    HARMFUL_ANSWERS,
    HARMFUL_LOSS,
    SAFE_AGREEMENT,
    SAFE_ANSWERS,
    SAFE_LOSS,
    verdict,
)
from sleb_serve.manifest.schema import Manifest
from sleb_serve.utils.atomic_io import write_atomically

Report = Mapping[str, Any]
_GAINS = ("decode", "prefill")


@dataclass(frozen=True)
class Depth:
    """One model of a study.

    Attributes:
        model: ``dense``, ``pruned`` or ``healed``.
        blocks: number of removed blocks.
        speed: speed-up over dense with its interval, by workload.
        perplexity: by text.
        agreement: lowest share of positions with the dense model's most likely token; None for
            dense.
        answers: reproduced share of the dense model's answers; None for dense.
        accuracy: mean of the tasks, or None.
        verdict: see `sleb_serve.evaluation.verdict`.
    """

    model: str
    blocks: int
    speed: Mapping[str, tuple[float, Sequence[float] | None]]
    perplexity: Mapping[str, float]
    agreement: float | None
    answers: float | None
    accuracy: float | None
    verdict: str | None

    @property
    def gain(self) -> float:
        """Return its speed-up, of generation if measured."""
        return self._measured[0]

    @property
    def faster(self) -> bool:
        """Return whether it is measurably faster than dense."""
        gain, interval = self._measured
        return (gain if interval is None else interval[0]) > 1

    @property
    def _measured(self) -> tuple[float, Sequence[float] | None]:
        return next((self.speed[name] for name in _GAINS if name in self.speed), (1.0, None))


def depths(evaluations: Mapping[str, Report], measured: Report) -> list[Depth]:
    """Return the dense model, and each depth pruned and healed."""
    found = []
    entries = [
        (model, entry) for model, report in evaluations.items() for entry in report["results"]
    ]
    dense = [entry for _, entry in entries if not entry["blocks"]]
    for model, entry in entries:
        tasks = [accuracy(values)[0] for values in entry["tasks"].values()]
        found.append(
            Depth(
                model if entry["blocks"] else DENSE,
                entry["blocks"],
                _speeds(measured, entry["blocks"]),
                entry["perplexity"],
                min(entry["agreement"].values(), default=None),
                entry["answers"].get("tokens"),
                fmean(tasks) if tasks else None,
                verdict(entry, dense),
            )
        )
    return sorted(found, key=lambda depth: depth.blocks)


def recommended(found: Sequence[Depth]) -> tuple[Depth | None, str]:
    """Return the fastest safe depth, or else the fastest to check, with the reason."""
    for word, why in (
        ("safe", "the fastest that every measure calls safe"),
        ("check", "the fastest that no measure calls harmful; check it on your own traffic"),
    ):
        fit = [depth for depth in found if depth.verdict == word and depth.faster]
        if fit:
            return max(fit, key=lambda depth: (depth.gain, depth.model == "healed")), why
    why = "no depth is shown to be faster without harm by some measure: remove fewer, or heal more"
    return None, why


def write_page(
    folder: Path, manifest: Manifest, evaluations: Mapping[str, Report], measured: Report
) -> Path:
    """Write the page as Markdown, HTML and JSON, and its plot.

    Returns:
        The Markdown file.
    """
    found = depths(evaluations, measured)
    best, why = recommended(found)
    content = {
        "model": manifest.model.id,
        "num_blocks": manifest.model.num_blocks,
        "recommended": None if best is None else {"model": best.model, "blocks": best.blocks},
        "why": why,
        "depths": [asdict(depth) for depth in found],
    }
    heading = f"{manifest.model.id}: which depth to serve"
    sections = [_recommendation(best, why, folder), _table(found), _steps()]
    write_atomically(folder / "study.json", (json.dumps(content, indent=2) + "\n").encode())
    drawn = {"study": _picture(found)}
    write_atomically(folder / "study.png", drawn["study"])
    write_atomically(folder / "study.html", page(heading, sections, drawn).encode())
    path = folder / "study.md"
    write_atomically(path, markdown(heading, sections).encode())
    return path


def _speeds(measured: Report, blocks: int) -> dict[str, tuple[float, Sequence[float] | None]]:
    found = {}
    for name, workload in measured["workloads"].items():
        for ratio in workload["ratios"]:
            variant = ratio["variant"]
            removed = measured["variants"][variant]["blocks"]
            if ratio["over"] == DENSE and removed == blocks and not is_beside(variant):
                found[name] = (ratio["ratio"], ratio["ratio_interval"])
    return found


def _recommendation(best: Depth | None, why: str, folder: Path) -> Section:
    if best is None:
        return Section("Recommended: the dense model", (), (why,), "study")
    manifest = folder / ("healed.json" if best.model == "healed" else "manifest.json")
    return Section(
        f"Recommended: {best.blocks} blocks removed, {best.model}",
        (),
        (why, f"`sleb-serve serve MODEL -m {manifest} --blocks {best.blocks}`"),
        "study",
    )


def _table(found: Sequence[Depth]) -> Section:
    workloads = list(dict.fromkeys(name for depth in found for name in depth.speed))
    texts = list(dict.fromkeys(name for depth in found for name in depth.perplexity))
    head = ("removed", "model", "verdict", *workloads)
    head += tuple(f"perplexity {Path(text).name}" for text in texts)
    rows: list[Row] = [(*head, "same tokens", "same answers", "mean accuracy")]
    for depth in found:
        speeds = [with_interval(*depth.speed[w]) if w in depth.speed else "" for w in workloads]
        perplexities = [f"{depth.perplexity[text]:.2f}" for text in texts]
        shares = ["" if s is None else f"{s:.1%}" for s in (depth.agreement, depth.answers)]
        mean = "" if depth.accuracy is None else f"{depth.accuracy:.3f}"
        own = (str(depth.blocks), depth.model, depth.verdict or "")
        rows.append((*own, *speeds, *perplexities, *shares, mean))
    notes = (
        f"Harmful: same tokens below {HARMFUL_AGREEMENT:.0%}, same answers below "
        f"{HARMFUL_ANSWERS:.0%}, or a mean accuracy more than {HARMFUL_LOSS:g} below dense. "
        f"Safe: at least {SAFE_AGREEMENT:.0%}, at least {SAFE_ANSWERS:.0%}, and at most "
        f"{SAFE_LOSS:g} below.",
        "Speeds are pruned over dense, with 95 % intervals; healing changes no shape, so a healed "
        "model has its pruned one's speed.",
        "Same tokens: the share of positions with the dense model's most likely next token, on "
        "the text with the lowest share. Same answers: the mean share of the dense model's "
        "answers to short questions before the first different token.",
    )
    # Without tasks, for example, a column is empty.
    full = [any(row[i] for row in rows[1:]) for i in range(len(rows[0]))]
    return Section("Every depth", tuple(tuple(compress(row, full)) for row in rows), notes)


def _steps() -> Section:
    files = (
        "`manifest.json`, `healed.json`: the removed blocks, and the updates of the kept weights",
        "`eval.json`, `healed.eval.json`: quality; lm-eval's own results are next to them",
        "`bench/report.html`: the speed measurements",
    )
    return Section("Source files", (), files)


def _picture(found: Sequence[Depth]) -> bytes:
    """Plot quality over measured speed: a panel per text, and one for the tasks."""
    import matplotlib

    matplotlib.use("Agg")
    texts = list(found[0].perplexity)
    panels = [(f"perplexity, {Path(text).name}", text) for text in texts]
    panels += [("mean accuracy of the tasks", "")] if found[0].accuracy is not None else []
    figure, axes = subplots(len(panels), 5.2, 4.4)
    for axis, (label, text) in zip(axes, panels, strict=True):
        for model in dict.fromkeys(depth.model for depth in found if depth.blocks):
            line = [depth for depth in found if depth.model in (DENSE, model)]
            values = [depth.perplexity[text] if text else depth.accuracy for depth in line]
            speeds = [depth.gain for depth in line]
            axis.plot(speeds, values, marker="o", label=model)
            for depth, speed, value in zip(line, speeds, values, strict=True):
                axis.annotate(
                    f"{depth.blocks} removed" if depth.blocks else DENSE,
                    (speed, value),
                    (-6, 6),
                    textcoords="offset points",
                    ha="right",
                    fontsize="small",
                )
        axis.set_xlabel("speed-up over dense, measured")
        axis.set_ylabel(label)
        axis.margins(0.18)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    return png(figure)
