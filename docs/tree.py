"""Generates the repository tree in docs/contributing.md."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_OTHER = {
    "benchmarks/draft": "the pruned model as draft for the dense model",
    "benchmarks/equal": "plugin against export; coverage of the intervals for equal engines",
    "benchmarks/fleet": "`plan`'s predictions for a saturating load, compared with real engines",
    "benchmarks/gpu": "the GPU measurement kit, which can be packed for a machine without a "
    "network",
    "benchmarks/healing": "the quality that healing recovers",
    "benchmarks/load": "load time and resident memory, dense and pruned",
    "benchmarks/records": "raw measurements",
    "benchmarks/repair": "the serving cost of a repair",
    "benchmarks/selection": "speed, memory, scaling and quality of the search",
    "benchmarks/soak": "a pruned server under mixed load",
    "deploy": "a Grafana dashboard, Prometheus, compose",
    "deploy/kubernetes": "a pruned model on two GPUs",
    "deploy/nginx": "another number of blocks without a gap",
    "docs": "this documentation; generate.py writes its generated parts",
    "requirements": "the lock files: the CPU stack, and the linters for deploy/",
    "tests": "the test suite; oracle.py computes independent reference results",
    ".ci/run": "the CI jobs: lint, types, tests",
    ".github/workflows": "the CI jobs on GitHub, and the release",
    "CHANGELOG.md": "changes by release",
    "Dockerfile": "sleb-serve in vLLM's own image",
    "Makefile": "set-up, demo, tests, documentation",
    "mkdocs.yml": "configuration of the documentation site",
    "pyproject.toml": "the package, its tools and the import contracts",
}


def tree() -> str:
    """Build the tree: packages with the first line of their docstrings, the rest from `_OTHER`."""
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
