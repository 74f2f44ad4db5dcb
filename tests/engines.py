"""Start vLLM engines for tests, and compare their answers with Transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import oracle
from conftest import ROOT
from forking import fork_engines, run_fork
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.manifest.binding import bind
from sleb_serve.manifest.pruning import Pruning
from sleb_serve.manifest.schema import Manifest, Removal
from sleb_serve.protocol import FORMAT
from sleb_serve.serving.command import pruned_overrides

PROMPTS = [[1, *range(40, 70)], [7, 300, 12, 90, 5, 5, 210, 33, 8]]
NEW_TOKENS = 12


@dataclass(frozen=True)
class Case:
    """One engine start: a model, the removed blocks, and settings."""

    model: str
    removed: tuple[int, ...]
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.model}-{'_'.join(map(str, self.removed)) or 'dense'}-{self.dtype}"

    def job(self, path: Path, **engine: Any) -> dict[str, Any]:
        formats = {"config_format": FORMAT, "load_format": FORMAT} if self.removed else {}
        return {
            "model": str(path),
            "overrides": overrides(path, self.removed) if self.removed else {},
            "prompts": PROMPTS,
            "max_tokens": NEW_TOKENS,
            "engine": {"dtype": self.dtype, **formats, **engine},
        }


def pruning(path: Path, removed: Sequence[int]) -> Pruning:
    manifest = Manifest(
        bind(str(path), open_checkpoint(str(path))), tuple(Removal(block) for block in removed)
    )
    return manifest.pruning()


def overrides(path: Path, removed: Sequence[int]) -> dict[str, Any]:
    return pruned_overrides(pruning(path, removed), open_checkpoint(str(path)))


def run_jobs(
    jobs: Sequence[dict[str, Any]],
    folder: Path,
    python: str = sys.executable,
    **environment: str,
) -> list[dict[str, Any]]:
    """Run jobs in one child process; the test fails if the process dies."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    if python == sys.executable and all(n.startswith(("VLLM_", "HF_")) for n in environment):
        code = run_fork(_run, folder / "output.log", folder, **environment)
    else:
        code = _run_anew(python, folder, environment)
    assert code == 0, (folder / "output.log").read_text(errors="replace")[-5000:]
    results: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return results


def _run(folder: Path) -> None:
    """Run in the child."""
    import engine_jobs

    os.chdir(folder)
    if all(_has_ranks(job) for job in json.loads(Path("jobs.json").read_text())):
        fork_engines()  # nothing is computed in this process itself
    engine_jobs.main("jobs.json", "results.json")


def _has_ranks(job: dict[str, Any]) -> bool:
    engine = job.get("engine", {})
    return any(engine.get(f"{way}_parallel_size", 1) > 1 for way in ("tensor", "pipeline"))


def _run_anew(python: str, folder: Path, environment: dict[str, str]) -> int:
    with (folder / "output.log").open("wb") as log:
        done = subprocess.run(
            [python, str(ROOT / "tests" / "engine_jobs.py"), "jobs.json", "results.json"],
            cwd=folder,
            env={**os.environ, **environment},
            stdout=log,
            stderr=log,
            check=False,
        )
    return done.returncode


def differences(result: dict[str, Any], model: Any) -> list[float]:
    """Absolute differences of prompt log-probabilities, an engine's against a model's."""
    assert "error" not in result, result["error"]
    found = [value for values in result["logprobs"] for value in values]
    expected = [value for prompt in PROMPTS for value in oracle.prompt_logprobs(model, prompt)]
    return [abs(a - b) for a, b in zip(found, expected, strict=True)]


def greedy_equal(
    result: dict[str, Any], model: Any, prompts: Sequence[Sequence[int]] = PROMPTS
) -> bool:
    """Whether an engine's continuations are a model's greedy ones, up to ties.

    One pass over prompt and continuation shows whether each token is the most likely.
    """
    tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.1
    for prompt, tokens in zip(prompts, result["tokens"], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0].float()
        said = logits[len(prompt) - 1 : -1]
        behind = said.max(-1).values - said.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        if float(behind.max()) > tolerance:
            return False
    return True


def check_greedy(result: dict[str, Any], model: Any, prompts: Sequence[Sequence[int]]) -> None:
    """Compare only continuations with a model's: all of them, at full length."""
    assert "error" not in result, result["error"]
    assert [len(tokens) for tokens in result["tokens"]] == [NEW_TOKENS] * len(prompts)
    assert greedy_equal(result, model, prompts)


def check_equal(result: dict[str, Any], path: Path, case: Case, limit: float = 1e-3) -> None:
    """Compare an engine's answers with Transformers with the blocks deleted."""
    model = oracle.pruned(path, case.removed, getattr(torch, case.dtype))
    found = differences(result, model)
    if case.dtype == "float32":
        assert max(found) < limit
        assert greedy_equal(result, model)
    else:
        assert sum(found) / len(found) < 0.1


def check_size(result: dict[str, Any], path: Path, case: Case) -> None:
    """Check that the engine has the kept layers' KV cache and a pruned model's parameters."""
    count = open_checkpoint(str(path)).num_blocks
    kept = [index for index in range(count) if index not in case.removed]
    for rank in result["ranks"]:
        parts = [part for name in rank["kv_cache_layers"] for part in name.split(".")]
        assert {int(part) for part in parts if part.isdigit()} == set(range(len(kept)))
        assert len(rank["kv_cache_layers"]) == len(kept)
        assert not case.removed or rank["layers"] == kept
    if case.removed and len(result["ranks"]) == 1:
        expected = oracle.parameter_counts(oracle.pruned(path, case.removed))
        assert result["ranks"][0]["parameters"] in expected
