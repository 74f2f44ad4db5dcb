"""Compiled engines: pipelines, ranks of them, and what stays in the compile cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import Models, save_model
from engines import Case, check_equal, check_size, run_jobs

pytest.importorskip("vllm")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four blocks: compiling takes seconds a block."""
    path = tmp_path_factory.mktemp("short") / "llama"
    save_model("llama", path, num_hidden_layers=4)
    return path


def test_compiled_equals_transformers_with_the_blocks_deleted(
    short: Path, models: Models, tmp_path: Path
) -> None:
    cases = {Case("opt", (1, 5)): models("opt"), Case("llama", (2,), "bfloat16"): short}
    jobs = [case.job(path, enforce_eager=False) for case, path in cases.items()]
    results = run_jobs(jobs, tmp_path, VLLM_CACHE_ROOT=str(tmp_path / "cache"))
    for (case, path), result in zip(cases.items(), results, strict=True):
        check_equal(result, path, case)
        check_size(result, path, case)


def test_three_ranks_share_heads_that_are_an_odd_number(tmp_path: Path) -> None:
    path, case = tmp_path / "model", Case("llama", (1, 3))
    # Of vLLM's, each rank's share of the vocabulary must be whole.
    heads: dict[str, Any] = {"num_attention_heads": 3, "num_key_value_heads": 3, "vocab_size": 384}
    save_model("llama", path, **heads, hidden_size=96, num_hidden_layers=6)
    job = case.job(path, tensor_parallel_size=3)
    (result,) = run_jobs([job], tmp_path, VLLM_CPU_OMP_THREADS_BIND="0|1|1")
    assert len(result["ranks"]) == 3
    check_equal(result, path, case)
    check_size(result, path, case)


def test_two_stages_hold_equally_many_of_the_layers_that_are_left(
    short: Path, tmp_path: Path
) -> None:
    # Compiled, since vLLM's own pipeline fails on a CPU in eager mode.
    case = Case("llama", (0, 1))  # all from one of the dense model's halves
    job = case.job(short, pipeline_parallel_size=2, enforce_eager=False)
    (result,) = run_jobs(
        [job], tmp_path, VLLM_CPU_OMP_THREADS_BIND="0|1", VLLM_CACHE_ROOT=str(tmp_path / "cache")
    )
    check_equal(result, short, case)
    assert [rank["layers"] for rank in result["ranks"]] == [[2], [3]]


def test_one_warm_compile_cache_serves_each_pruning_its_own_graph(
    short: Path, tmp_path: Path
) -> None:
    """Dense, pruned, pruned as the manifest says once it has changed, and dense again.

    vLLM on a CPU compiles anew where a GPU would load what it finds under the same key, so the
    keys are held against each other, too.
    """
    cases = [Case("llama", removed) for removed in ((), (1,), (2,), ())]
    jobs = [case.job(short, enforce_eager=False) for case in cases]
    results = run_jobs(jobs, tmp_path, VLLM_CACHE_ROOT=str(tmp_path / "cache"))
    for case, result in zip(cases, results, strict=True):
        check_equal(result, short, case)
    hashes = [result["hash"] for result in results]
    assert len(set(hashes)) == 3
    assert hashes[0] == hashes[3]
    saved = tmp_path / "cache" / "torch_compile_cache" / "torch_aot_compile"
    assert len(list(saved.iterdir())) == 3
