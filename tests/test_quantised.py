"""Quantised checkpoints, pruned by the plugin, against physically pruned ones in stock vLLM."""

from __future__ import annotations

from typing import Any

import pytest

import checkpoints
from conftest import Models
from engines import PROMPTS, Case, run_jobs

pytest.importorskip("vllm")

FORMS = ("int8", "fp8", "gptq", "awq")
REMOVED = (2, 5)
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """By form: what the plugin serves, and what vLLM serves of the twin without the blocks."""
    folder = tmp_path_factory.mktemp("quantised")
    # Some kernels take 16-bit activations only, which ones depends on the CPU.
    asked = {"prompts": PROMPTS, "max_tokens": 4}
    jobs = {}
    for name in FORMS:
        quantised = getattr(checkpoints, name)(models("llama"), folder / name)
        twin = checkpoints.compacted(quantised, folder / f"{name}-twin", REMOVED)
        jobs[name] = {**Case(name, REMOVED).job(quantised, dtype="bfloat16"), **asked}
        jobs[f"{name} twin"] = {**Case("twin", ()).job(twin, dtype="bfloat16"), **asked}
    return dict(zip(jobs, run_jobs(list(jobs.values()), folder), strict=True))


@pytest.mark.parametrize("name", FORMS)
def test_quantised_equals_its_physically_pruned_twin(name: str, results: Results) -> None:
    found, twin = results[name], results[f"{name} twin"]
    if "no attribute 'cpu_gemm_wna16'" in twin.get("error", ""):
        pytest.skip("this vLLM has no 4-bit kernels for a CPU without AVX-512")
    assert "error" not in found, found["error"]
    assert "error" not in twin, twin["error"]
    assert found["tokens"] == twin["tokens"]
    assert found["logprobs"] == twin["logprobs"]


def test_each_form_rounds_in_its_own_way(results: Results) -> None:
    """So that none is the plain weights by another name."""
    if any("error" in result for result in results.values()):
        pytest.skip("this vLLM has no 4-bit kernels for a CPU without AVX-512")
    said = {name: str(results[name]["logprobs"]) for name in FORMS}
    # GPTQ and AWQ hold the same numbers of 4 bits, packed in two orders.
    assert said["gptq"] == said["awq"]
    assert len(set(said.values())) == 3
