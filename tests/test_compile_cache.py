"""Compiled engines, and their compile cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import save_model
from engines import Case, check_equal, check_size, run_jobs
from repairs import check_repaired, repaired_job

pytest.importorskip("vllm")


@pytest.mark.slow
def test_one_warm_compile_cache_serves_each_pruning_its_own_graph(
    tmp_path: Path,
) -> None:
    """Dense, pruned, pruned and repaired as the manifest says once it has changed, dense again.

    vLLM on a CPU compiles again where a GPU would load what it finds under the same key, so the
    keys are held against each other, too.
    """
    path = tmp_path / "opt"
    save_model("opt", path, num_hidden_layers=2)
    dense, pruned = Case("opt", ()), Case("opt", (0,))
    jobs = [case.job(path, enforce_eager=False) for case in (dense, pruned, dense)]
    jobs.insert(2, repaired_job(path, (1,), tmp_path / "m.json", enforce_eager=False))
    results = run_jobs(jobs, tmp_path, VLLM_CACHE_ROOT=str(tmp_path / "cache"))
    for case, result in ((dense, results[0]), (pruned, results[1]), (dense, results[3])):
        check_equal(result, path, case)
        check_size(result, path, case)
    check_repaired(results[2], path, (1,), tmp_path / "m.json")
    hashes = [result["hash"] for result in results]
    assert len(set(hashes)) == 3
    assert hashes[0] == hashes[3]
    saved = tmp_path / "cache" / "torch_compile_cache" / "torch_aot_compile"
    assert len(list(saved.iterdir())) == 3
