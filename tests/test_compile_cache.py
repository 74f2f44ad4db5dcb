"""The compile cache of compiled engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import save_model
from engines import Case, check_equal, run_jobs

pytest.importorskip("vllm")


@pytest.mark.slow
def test_one_warm_compile_cache_serves_each_pruning_its_own_graph(
    tmp_path: Path,
) -> None:
    """Dense, pruned, pruned as the manifest says once it has changed, and dense again.

    vLLM on a CPU compiles anew where a GPU would load what it finds under the same key, so the
    keys are held against each other, too.
    """
    path = tmp_path / "model"
    save_model("llama", path, num_hidden_layers=2)
    cases = [Case("llama", removed) for removed in ((), (0,), (1,), ())]
    jobs = [case.job(path, enforce_eager=False) for case in cases]
    results = run_jobs(jobs, tmp_path, VLLM_CACHE_ROOT=str(tmp_path / "cache"))
    for case, result in zip(cases, results, strict=True):
        check_equal(result, path, case)
    hashes = [result["hash"] for result in results]
    assert len(set(hashes)) == 3
    assert hashes[0] == hashes[3]
    saved = tmp_path / "cache" / "torch_compile_cache" / "torch_aot_compile"
    assert len(list(saved.iterdir())) == 3
