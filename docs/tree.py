"""The generated part that shows the repository's tree."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_OTHER = {
    "benchmarks/draft": "the pruned model as draft of its dense self",
    "benchmarks/equal": "plugin against export; how often the intervals of equals hold 1",
    "benchmarks/fleet": "what `plan` predicts of a saturating load, against engines that run it",
    "benchmarks/gpu": "the kit that measures on a GPU, and packs itself for one without a network",
    "benchmarks/healing": "what healing brings back of a pruned model's quality",
    "benchmarks/load": "load time and resident memory, dense and pruned",
    "benchmarks/records": "what was measured, raw",
    "benchmarks/repair": "what a repair costs to serve",
    "benchmarks/selection": "the selector's speed, size, scaling and quality",
    "benchmarks/soak": "a pruned server under mixed load",
    "deploy": "a Grafana board, Prometheus, compose",
    "deploy/kubernetes": "a pruned model on two GPUs",
    "deploy/nginx": "another number of blocks without a gap",
    "docs": "this documentation; generate.py writes its generated parts",
    "requirements": "the lock files: the CPU stack, and what checks deploy/",
    "tests": "the suite; oracle.py holds the independent answers",
    ".ci/run": "what CI runs: lint, types, tests",
    ".github/workflows": "the same on GitHub, and the release",
    "CHANGELOG.md": "what changed, by release",
    "Dockerfile": "sleb-serve in vLLM's own image",
    "Makefile": "set-up, demo, tests, documentation",
    "mkdocs.yml": "how this documentation is built",
    "pyproject.toml": "the package, its tools and the import contracts",
}


def tree() -> str:
    """The repository: packages by the first line of their docstrings, the rest by `_OTHER`."""
    entries = dict(_OTHER)
    for base in (ROOT / "sleb_serve", ROOT / "plugins", ROOT / "benchmarks"):
        for file in base.rglob("__init__.py"):
            docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            name = file.parent.relative_to(ROOT).as_posix()
            entries[name] = docstring.partition("\n")[0].rstrip(".")
    order = ("sleb_serve", "plugins", "benchmarks")
    ranked = sorted(entries, key=lambda name: (not name.startswith(order), name))
    lines = []
    for name in ranked:
        first, *more = textwrap.wrap(entries[name], 66)
        lines += [f"{_shown(name):26}{first}", *(f"{'':26}{line}" for line in more)]
    return "\n".join(["```text", *lines, "```"])


def _shown(name: str) -> str:
    return f"{name}/" if (ROOT / name).is_dir() else name
