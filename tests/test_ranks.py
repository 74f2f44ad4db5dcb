"""Ranks by the three, and stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import save_model
from engines import Case, check_equal, check_size, run_jobs

pytest.importorskip("vllm")

pytestmark = pytest.mark.slow


def test_three_ranks_share_heads_that_are_an_odd_number(tmp_path: Path) -> None:
    path, case = tmp_path / "model", Case("llama", (1, 3))
    # Each rank's share of every matrix must be whole.
    heads: dict[str, Any] = {"num_attention_heads": 3, "num_key_value_heads": 3, "vocab_size": 384}
    sizes: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 192}
    save_model("llama", path, **heads, **sizes, num_hidden_layers=6)
    job = {**case.job(path, tensor_parallel_size=3), "max_tokens": 4}
    (result,) = run_jobs([job], tmp_path, VLLM_CPU_OMP_THREADS_BIND="0|1|1")
    assert len(result["ranks"]) == 3
    check_equal(result, path, case)
    check_size(result, path, case)


def test_two_stages_hold_equally_many_of_the_layers_that_are_left(tmp_path: Path) -> None:
    # Traced, since vLLM's own pipeline fails on a CPU in eager mode; but kernels are not compiled.
    path, case = (
        tmp_path / "model",
        Case("llama", (0, 1)),
    )  # all from one of the dense model's halves
    save_model("llama", path, num_hidden_layers=4)
    traced = {"enforce_eager": False, "compilation_config": {"backend": "eager"}}
    job = case.job(path, pipeline_parallel_size=2, **traced)
    (result,) = run_jobs([job], tmp_path, VLLM_CPU_OMP_THREADS_BIND="0|1", VLLM_USE_AOT_COMPILE="0")
    check_equal(result, path, case)
    assert [rank["layers"] for rank in result["ranks"]] == [[2], [3]]
