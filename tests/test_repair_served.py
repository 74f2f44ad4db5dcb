"""Repaired models in vLLM, against Transformers with the repair's weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import oracle
from conftest import Models
from engines import Case, check_size, differences, greedy_equal, run_jobs
from repairs import manifest_of, repaired
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.manifest.repair_file import read_sidecar
from sleb_serve.serving.command import pruned_overrides

pytest.importorskip("vllm")

REMOVED = (2, 3, 6)
SERVED = [("llama", REMOVED), ("opt", (1, 3)), ("qwen2", (1, 3))]


@pytest.fixture
def jobs(models: Models, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    def make(cases: Sequence[tuple[str, tuple[int, ...]]], **engine: Any) -> Any:
        made = []
        for number, (name, removed) in enumerate(cases):
            path = models(name)
            manifest = manifest_of(path, removed, tmp_path / f"{number}.json")
            job = Case(name, removed).job(path, **engine)
            checkpoint = open_checkpoint(str(path))
            made.append({**job, "overrides": pruned_overrides(manifest.pruning(), checkpoint)})
        return made

    return make


def check(
    results: list[dict[str, Any]],
    cases: Sequence[tuple[str, tuple[int, ...]]],
    models: Models,
    folder: Path,
) -> None:
    for number, (result, (name, removed)) in enumerate(zip(results, cases, strict=True)):
        manifest = read_manifest(folder / f"{number}.json")
        model = repaired(models(name), removed, read_sidecar(manifest.pruning()))
        assert max(differences(result, model)) < 1e-3
        assert greedy_equal(result, model)
        check_size(result, models(name), Case(name, removed))
        # The repair is not so small that its absence would pass.
        assert max(differences(result, oracle.pruned(models(name), removed))) > 1e-2


def test_vllm_serves_repaired_models_as_transformers_computes_them(
    models: Models, jobs: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    check(run_jobs(jobs(SERVED), tmp_path), SERVED, models, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [{"tensor_parallel_size": 2}, {"enforce_eager": False}], ids=str)
def test_repaired_models_on_two_ranks_and_compiled(
    models: Models,
    jobs: Callable[..., list[dict[str, Any]]],
    tmp_path: Path,
    engine: dict[str, Any],
) -> None:
    cases = SERVED[:2]
    environment = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    if "tensor_parallel_size" in engine:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    check(run_jobs(jobs(cases, **engine), tmp_path, **environment), cases, models, tmp_path)


@pytest.mark.slow
def test_smollm2_repaired_in_vllm_is_smollm2_repaired_in_transformers(
    smollm2: Path, tmp_path: Path
) -> None:
    removed, checkpoint = (17, 18), open_checkpoint(str(smollm2))
    manifest = manifest_of(smollm2, removed, tmp_path / "m.json", count=8, length=96)
    job = Case("smollm2", removed).job(smollm2)
    job["overrides"] = pruned_overrides(manifest.pruning(), checkpoint)
    (result,) = run_jobs([job], tmp_path)
    model = repaired(smollm2, removed, read_sidecar(manifest.pruning()))
    assert max(differences(result, model)) < 1e-3
    assert greedy_equal(result, model)
    assert max(differences(result, oracle.pruned(smollm2, removed))) > 1e-2


def test_an_engine_refuses_a_sidecar_that_changed(
    models: Models, jobs: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    good, bad = jobs([SERVED[0], SERVED[1]])
    Path(bad["overrides"]["sleb"][0]["repair"]["path"]).write_bytes(b"")
    for job in (good, bad):
        job["only_configure"] = True
    results = run_jobs([good, bad], tmp_path)
    assert "hash" in results[0]
    assert "is not the manifest's: sha256 expected" in results[1]["error"]
