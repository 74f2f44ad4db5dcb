"""The equality matrix: tiny random models of many architectures, pruned in vLLM."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import oracle
from engines import Case, check_equal, check_size, differences, run_jobs
from tiny import TINY

Models = Callable[[str], Path]

pytest.importorskip("vllm")

SETS = ((1, 3), (0, 1, 3), (1, 5), (0, 5))
FAST = (
    "mistral",
    "qwen2",
    "qwen3",
    "gemma3",
    "gpt2",
    "bloom",
    "stablelm",
    "mixtral",
    "gpt_oss",
    "gpt_neox",
)
"""One of each form that a loop over layers takes; `make test-all` runs all of them."""

names = os.environ.get("SLEB_TEST_ARCHITECTURES", ",".join(FAST))
NAMES = tuple(TINY) if names == "all" else tuple(names.split(","))
CASES = [
    Case(name, removed)
    for name in NAMES
    for removed in ((), *(SETS if names == "all" else SETS[1:3]))
]


@pytest.fixture(scope="module")
def results(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, dict[str, Any]]:
    """Every case's engine, one after the other in one process."""
    folder = tmp_path_factory.mktemp("matrix")
    jobs = [case.job(models(case.model), max_num_batched_tokens=256) for case in CASES]
    return dict(zip(CASES, run_jobs(jobs, folder), strict=True))


@pytest.mark.parametrize("case", [case for case in CASES if case.removed], ids=str)
def test_pruned_equals_transformers_with_the_blocks_deleted(
    case: Case, results: dict[Case, dict[str, Any]], models: Models
) -> None:
    path = models(case.model)
    # Where dense vLLM and dense Transformers differ, pruned cannot agree better than they do.
    dense = max(differences(results[Case(case.model, ())], oracle.load(path)))
    check_equal(results[case], path, case, max(1e-3, 2 * dense))
    check_size(results[case], path, case)
    assert dense < 1e-3
