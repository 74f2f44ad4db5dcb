"""The generated parts about GPUs: the kit's measurements, and the roofline's predictions."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sleb_serve.cli.main import main

RECORDS = Path(__file__).resolve().parent.parent / "benchmarks" / "records" / "gpu"


def gpu(records: Path = RECORDS) -> str:
    """Return a table per run of the kit in benchmarks/gpu, or a note if there is none."""
    runs = sorted(records.glob("*/results.jsonl"))
    if not runs:
        return "No record yet: nothing of this project has run on a GPU."
    return "\n\n".join(_gpu_run(path) for path in runs)


def _gpu_run(path: Path) -> str:
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    results = [entry for entry in entries if entry["record"] == "result"]
    about = next((entry for entry in results if entry["what"] == "versions"), {})
    names = ("gpu", "vllm", "torch", "transformers", "commit")
    versions = ", ".join(f"{name} {about[name]}" for name in names if about.get(name))
    lines = [f"**{path.parent.name}**: {versions or 'machine not noted'}.", ""]
    lines += ["| step | outcome | s | what was found |", "|---|---|---|---|"]
    for step in (entry for entry in entries if entry["record"] == "step"):
        own = [entry for entry in results if entry["step"] == step["step"]]
        found = [_escaped(text) for entry in own if (text := _gpu_result(entry))]
        why = [_escaped(step["why"])] if step.get("why") else []
        # What a stopped benchmark had started is in its log alone.
        why += [x for x in step.get("log", "").splitlines() if re.search(r": ready in \d+ s", x)]
        seconds = step.get("seconds", "")
        told = "<br>".join([*why, *found])
        lines.append(f"| `{step['step']}` | {step['outcome']} | {seconds} | {told} |")
    return "\n".join(lines)


def _gpu_result(entry: Mapping[str, Any]) -> str:
    """Format a result in one line; empty for irrelevant ones."""
    if "error" in entry or "skipped" in entry:
        return f"{entry['what']}: {entry.get('error') or entry['skipped']}"
    what = entry["what"]
    if what == "equality":
        how = f"{entry['dtype']}, runner V{entry['runner']}{', graphs' * entry['graphs']}"
        far = f", dense {entry['mean_from_dense']:.2g} away" if "mean_from_dense" in entry else ""
        return (
            f"{entry['model']} without {entry['removed']}, {how}: mean difference "
            f"{entry['mean_difference']:.2g}{far}"
        )
    if what == "ratio":
        ideal = f", ideal {entry['ideal']:.3f}" if entry.get("ideal") else ""
        over = f"{entry['variant']} over {entry['over']}"
        return f"{entry['workload']}, {over}: {entry['ratio']:.3f}{ideal}"
    if what == "engine":
        cache = entry["kv_cache_tokens"]
        return f"{entry['variant']}: ready in {entry['startup_time']:.0f} s, KV cache {cache:.0f}"
    numbers = {k: v for k, v in entry.items() if isinstance(v, float | int) and k != "seconds"}
    return f"{what}: " + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def _escaped(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def gpu_plan() -> str:
    """Return the output of `sleb-serve plan` for LLaMA-2-70B on the planned machines."""
    parts = []
    for arguments in (
        ["--gpu", "A100-80G", "-tp", "2"],
        ["--gpu", "A100-80G", "-tp", "2", "--split", "layers"],
        ["--gpu", "H100-80G", "-tp", "8"],
    ):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            main(["plan", "llama-2-70b", *arguments])
        command = " ".join(["sleb-serve plan llama-2-70b", *arguments])
        parts.append(f"```text\n$ {command}\n{printed.getvalue().strip()}\n```")
    return "\n\n".join(parts)
