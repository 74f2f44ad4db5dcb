"""The vLLM plugin against Transformers with the blocks deleted, on real vLLM engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import oracle
from conftest import ROOT
from sleb_serve.checkpoint import open_checkpoint
from sleb_serve.manifest import Pruning
from sleb_serve.serve import pruned_overrides

Models = Callable[[str], Path]

pytest.importorskip("vllm")

PROMPTS = [[1, *range(40, 70)], [7, 300, 12, 90, 5, 5, 210, 33, 8]]
NEW_TOKENS = 12


@dataclass(frozen=True)
class Case:
    """One engine start: a model, the removed blocks, and how it is run."""

    model: str
    removed: tuple[int, ...]
    dtype: str = "float32"

    def job(self, path: Path, **engine: Any) -> dict[str, Any]:
        return {
            "model": str(path),
            "overrides": overrides(path, self.removed) if self.removed else {},
            "prompts": PROMPTS,
            "max_tokens": NEW_TOKENS,
            "engine": {"dtype": self.dtype, **engine},
        }


def pruning(path: Path, removed: Sequence[int]) -> Pruning:
    checkpoint = open_checkpoint(str(path))
    return Pruning(
        checkpoint.architecture,
        checkpoint.num_blocks,
        checkpoint.config_sha256(),
        checkpoint.weights_sha256(),
        tuple(sorted(removed)),
    )


def overrides(path: Path, removed: Sequence[int]) -> dict[str, Any]:
    return pruned_overrides(pruning(path, removed), open_checkpoint(str(path)))


def run_jobs(
    jobs: Sequence[dict[str, Any]], folder: Path, **environment: str
) -> list[dict[str, Any]]:
    """Run jobs in one child process; a job that breaks it is an error of the test."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "engine_jobs.py"), "jobs.json", "results.json"],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    (folder / "output.log").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    results: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return results


def check_equal(result: dict[str, Any], path: Path, case: Case) -> None:
    """Hold an engine's answers against Transformers with the blocks deleted."""
    model = oracle.pruned(path, case.removed, getattr(torch, case.dtype))
    differences = []
    for prompt, found in zip(PROMPTS, result["logprobs"], strict=True):
        expected = oracle.prompt_logprobs(model, prompt)
        differences += [abs(a - b) for a, b in zip(found, expected, strict=True)]
    if case.dtype == "float32":
        assert max(differences) < 1e-3
        for prompt, found in zip(PROMPTS, result["tokens"], strict=True):
            assert found == oracle.greedy(model, prompt, NEW_TOKENS)
    else:
        assert sum(differences) / len(differences) < 0.1


def check_size(result: dict[str, Any], path: Path, case: Case) -> None:
    """The engine holds the kept layers' KV cache and exactly a pruned model's parameters."""
    count = open_checkpoint(str(path)).num_blocks
    for rank in result["ranks"]:
        layers = {int(part) for name in rank["kv_cache_layers"] for part in name.split(".")
                  if part.isdigit()}  # fmt: skip
        assert layers == set(range(count)) - set(case.removed)
        assert len(rank["kv_cache_layers"]) == count - len(case.removed)
    if case.removed and len(result["ranks"]) == 1:
        model = oracle.pruned(path, case.removed)
        assert result["ranks"][0]["parameters"] == sum(p.numel() for p in model.parameters())


EAGER = [
    Case("llama", ()),
    Case("llama", (2, 5)),
    Case("llama", (0,)),
    Case("llama", (7,)),
    Case("llama", (0, 3, 4, 7)),
    Case("llama", (2, 5), "bfloat16"),
    Case("opt", ()),
    Case("opt", (1, 3)),
    Case("opt", (0,)),
    Case("opt", (5,)),
    Case("opt", (1, 3), "bfloat16"),
    Case("smollm2", (5, 25, 17, 16, 18, 12)),
    Case("smollm2", (5, 25, 17, 16, 18, 12), "bfloat16"),
    Case("smollm2", (0, 29)),
]


@pytest.fixture(scope="module")
def find(models: Models, request: pytest.FixtureRequest) -> Callable[[str], Path]:
    def folder(name: str) -> Path:
        if name == "smollm2":
            path: Path = request.getfixturevalue("smollm2")
            return path
        return models(name)

    return folder


@pytest.fixture(scope="module")
def eager(
    find: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[Case, dict[str, Any]]:
    """Every eager case, in one process: dense and pruned models by turns."""
    cases = EAGER
    try:
        find("smollm2")
    except pytest.skip.Exception:
        cases = [case for case in EAGER if case.model != "smollm2"]
    jobs = [case.job(find(case.model)) for case in cases]
    results = run_jobs(jobs, tmp_path_factory.mktemp("eager"))
    return dict(zip(cases, results, strict=True))


@pytest.mark.parametrize("case", EAGER, ids=str)
def test_eager_equals_transformers_with_the_blocks_deleted(
    case: Case, eager: dict[Case, dict[str, Any]], find: Callable[[str], Path]
) -> None:
    path = find(case.model)
    check_equal(eager[case], path, case)
    check_size(eager[case], path, case)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_kv_cache_holds_more_tokens_by_the_share_of_blocks_gone(
    name: str, eager: dict[Case, dict[str, Any]], find: Callable[[str], Path]
) -> None:
    count = open_checkpoint(str(find(name))).num_blocks
    dense = eager[Case(name, ())]["kv_cache_tokens"]
    for case, result in eager.items():
        if case.model == name and case.dtype == "float32":
            ratio = result["kv_cache_tokens"] / dense
            assert ratio == pytest.approx(count / (count - len(case.removed)), rel=0.01)


def test_every_pruning_has_a_compile_cache_key_of_its_own(
    eager: dict[Case, dict[str, Any]],
) -> None:
    hashes = [r["hash"] for case, r in eager.items() if case.model == "llama"]
    assert len(set(hashes)) == len(hashes)


def test_the_dense_model_is_as_without_the_plugin(
    eager: dict[Case, dict[str, Any]], find: Callable[[str], Path], tmp_path: Path
) -> None:
    cases = [Case("llama", ()), Case("opt", ())]
    jobs = [case.job(find(case.model)) for case in cases]
    without = run_jobs(jobs, tmp_path, VLLM_PLUGINS="none")
    for case, result in zip(cases, without, strict=True):
        assert eager[case] == result


COMPILED = [Case("llama", (0, 2, 5)), Case("opt", (1, 5)), Case("smollm2", (5, 25, 17, 16, 18, 12))]


@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiled_equals_transformers_with_the_blocks_deleted(
    case: Case, find: Callable[[str], Path], tmp_path: Path
) -> None:
    path = find(case.model)
    job = case.job(path, enforce_eager=False)
    (result,) = run_jobs([job], tmp_path, VLLM_CACHE_ROOT=str(tmp_path / "cache"))
    check_equal(result, path, case)
    check_size(result, path, case)


@pytest.mark.parametrize("case", [Case("llama", (0, 2, 5)), Case("opt", (1, 5))], ids=str)
def test_two_ranks_equal_transformers_with_the_blocks_deleted(
    case: Case, find: Callable[[str], Path], tmp_path: Path
) -> None:
    path = find(case.model)
    job = case.job(path, tensor_parallel_size=2)
    (result,) = run_jobs([job], tmp_path, VLLM_CPU_OMP_THREADS_BIND="0|1")
    assert len(result["ranks"]) == 2
    check_equal(result, path, case)
    check_size(result, path, case)


def test_what_does_not_fit_is_refused_before_any_worker_starts(
    find: Callable[[str], Path], tmp_path: Path
) -> None:
    llama, opt = find("llama"), find("opt")
    good = overrides(llama, (2, 5))
    sleb = good["sleb"]

    def case(model: Path = llama, **changes: Any) -> dict[str, Any]:
        job = {"model": str(model), "overrides": good, "only_configure": True}
        return {**job, **changes}

    def with_sleb(**changes: Any) -> dict[str, Any]:
        return {**good, "sleb": {**sleb, **changes}}

    cases = [
        (case(), None),
        (case(opt), "another model than .*opt.*LlamaForCausalLM, found OPTForCausalLM"),
        (case(find("mistral")), "architecture expected LlamaForCausalLM"),
        (case(overrides=with_sleb(weights_sha256="0" * 64)), "weights_sha256 expected 0000"),
        (case(overrides=with_sleb(config_sha256="0" * 64)), "config_sha256 expected 0000"),
        (case(overrides=with_sleb(num_blocks=9)), "number of decoder blocks expected 9, found 8"),
        (case(overrides=with_sleb(removed=[2, 8])), "must be between 0 and 7"),
        (case(overrides=with_sleb(extra=1)), "unknown key 'extra'"),
        (case(overrides=with_sleb(architecture="OPTForCausalLM")), "with a manifest for OPT"),
        (case(overrides={"architectures": good["architectures"]}), "without a manifest"),
        (case(overrides={**good, "num_hidden_layers": 6}), "do not override num_hidden_layers"),
        (case(engine={"pipeline_parallel_size": 2}), "pipeline parallelism"),
        (case(overrides={"architectures": ["SlebFooForCausalLM"]}), "not supported for now"),
    ]
    results = run_jobs([job for job, _ in cases], tmp_path)
    for (_, message), result in zip(cases, results, strict=True):
        if message is None:
            assert "error" not in result
        else:
            import re

            assert re.search(message, result.get("error", "accepted")), (message, result)
