"""Repaired models in vLLM, against Transformers with the repair's weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import Models
from engines import run_jobs
from healing import healed, healed_job, oracle_of
from repairs import check_answers, check_repaired, repaired_job

pytest.importorskip("vllm")

SERVED = {"llama": (2, 3, 6), "opt": (1, 3), "qwen2": (1, 3)}


def test_vllm_serves_repaired_models_as_transformers_computes_them(
    models: Models, tmp_path: Path
) -> None:
    jobs = [
        repaired_job(models(name), removed, tmp_path / f"{name}.json")
        for name, removed in SERVED.items()
    ]
    path, removed, output = models("llama"), (2, 3, 6), tmp_path / "healed.json"
    healed(path, removed, output)
    *results, last = run_jobs([*jobs, healed_job(path, removed, output)], tmp_path)
    for result, (name, blocks) in zip(results, SERVED.items(), strict=True):
        check_repaired(result, models(name), blocks, tmp_path / f"{name}.json")
    check_answers(last, oracle_of(path, removed, output), path, removed)


@pytest.mark.slow
def test_repaired_models_on_two_ranks(models: Models, tmp_path: Path) -> None:
    opt, gone = models("opt"), SERVED["opt"]
    jobs = [repaired_job(opt, gone, tmp_path / "opt.json", tensor_parallel_size=2)]
    path, blocks, output = models("llama"), (2, 3, 6), tmp_path / "healed.json"
    healed(path, blocks, output)
    jobs.append(healed_job(path, blocks, output, tensor_parallel_size=2))
    folded, last = run_jobs(jobs, tmp_path, VLLM_CPU_OMP_THREADS_BIND="0|1")
    check_repaired(folded, opt, gone, tmp_path / "opt.json")
    check_answers(last, oracle_of(path, blocks, output), path, blocks)


@pytest.mark.slow
def test_smollm2_repaired_in_vllm_is_smollm2_repaired_in_transformers(
    smollm2: Path, tmp_path: Path
) -> None:
    removed, manifest = (17, 18), tmp_path / "m.json"
    job = repaired_job(smollm2, removed, manifest, text={"count": 8, "length": 96})
    (result,) = run_jobs([job], tmp_path)
    check_repaired(result, smollm2, removed, manifest)


def test_an_engine_refuses_a_sidecar_that_changed(models: Models, tmp_path: Path) -> None:
    good, bad = (
        repaired_job(models(name), SERVED[name], tmp_path / f"{name}.json")
        for name in ("llama", "opt")
    )
    Path(bad["overrides"]["sleb"][0]["repair"]["path"]).write_bytes(b"")
    results = run_jobs([{**job, "only_configure": True} for job in (good, bad)], tmp_path)
    assert "hash" in results[0]
    assert "is not the manifest's: sha256 expected" in results[1]["error"]
