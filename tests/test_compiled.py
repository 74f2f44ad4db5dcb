"""Compiled engines and ranks. Compiling takes seconds a block, so the models are short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import save_model
from engines import Case, check_equal, check_size, run_jobs
from repairs import check_repaired, repaired_job

pytest.importorskip("vllm")

pytestmark = pytest.mark.slow


def test_compiled_equals_transformers_with_the_blocks_deleted(tmp_path: Path) -> None:
    path, case = tmp_path / "model", Case("opt", (1,))
    save_model("opt", path, num_hidden_layers=3)
    job = case.job(path, enforce_eager=False)
    (result,) = run_jobs([job], tmp_path, VLLM_CACHE_ROOT=str(tmp_path / "cache"))
    check_equal(result, path, case)
    check_size(result, path, case)


def test_a_repaired_model_is_compiled_with_its_repair(tmp_path: Path) -> None:
    path, removed = tmp_path / "model", (1,)
    save_model("llama", path, num_hidden_layers=3)
    job = repaired_job(path, removed, tmp_path / "m.json", enforce_eager=False)
    (result,) = run_jobs([job], tmp_path, VLLM_CACHE_ROOT=str(tmp_path / "cache"))
    check_repaired(result, path, removed, tmp_path / "m.json")


def test_three_ranks_share_heads_that_are_an_odd_number(tmp_path: Path) -> None:
    path, case = tmp_path / "model", Case("llama", (1, 3))
    # Each rank's share of every matrix must be whole.
    heads: dict[str, Any] = {"num_attention_heads": 3, "num_key_value_heads": 3, "vocab_size": 384}
    sizes: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 192}
    save_model("llama", path, **heads, **sizes, num_hidden_layers=6)
    job = case.job(path, tensor_parallel_size=3)
    (result,) = run_jobs([job], tmp_path, VLLM_CPU_OMP_THREADS_BIND="0|1|1")
    assert len(result["ranks"]) == 3
    check_equal(result, path, case)
    check_size(result, path, case)


def test_two_stages_hold_equally_many_of_the_layers_that_are_left(tmp_path: Path) -> None:
    # Compiled, since vLLM's own pipeline fails on a CPU in eager mode.
    path, case = (
        tmp_path / "model",
        Case("llama", (0, 1)),
    )  # all from one of the dense model's halves
    save_model("llama", path, num_hidden_layers=4)
    job = case.job(path, pipeline_parallel_size=2, enforce_eager=False)
    (result,) = run_jobs(
        [job], tmp_path, VLLM_CPU_OMP_THREADS_BIND="0|1", VLLM_CACHE_ROOT=str(tmp_path / "cache")
    )
    check_equal(result, path, case)
    assert [rank["layers"] for rank in result["ranks"]] == [[2], [3]]
