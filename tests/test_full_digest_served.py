"""The full digest in vLLM: engines and servers compare it when they are asked to."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from changed_weights import CHANGES, REMOVED, changed_models
from conftest import Models
from engines import Case, check_equal, run_jobs
from running import LOCAL, OPTIONS, printed_command, run_until_end
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.serving.command import pruned_overrides

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def root(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return changed_models(models("llama"), tmp_path_factory.mktemp("full"))


def engine_job(root: Path, name: str, *, full: bool, **engine: Any) -> dict[str, Any]:
    """A job of the pruned model on the checkpoint of that name."""
    path, pruning = root / name, read_manifest(root / "m.json").pruning(full=full)
    asked = pruned_overrides(pruning, open_checkpoint(str(path)))
    job = Case("llama", REMOVED).job(root / "model", **engine)
    return {**job, "model": str(path), "overrides": asked}


def test_an_engine_compares_what_it_is_asked_to(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "sharded", tmp_path / "less")
    (tmp_path / "less/gone.safetensors").unlink()
    full, quick = (partial(engine_job, root, full=asked) for asked in (True, False))
    jobs = {
        "model": (full("model"), None),
        "without the removed shard": (full(str(tmp_path / "less")), None),
        "removed": (full("removed"), None),
        "noise, quick": (quick("noise"), None),
        "byte, quick": (quick("byte"), None),
        **{name: (full(name), CHANGES[name][1]) for name in ("byte", "row")},
        "noise": (full("noise"), "what lies outside the blocks and 6 more differs"),
        "eager": (
            full("model", safetensors_load_strategy="eager"),
            "--safetensors-load-strategy eager may read other bytes",
        ),
    }
    results = run_jobs([asked for asked, _ in jobs.values()], tmp_path)
    for name, result in zip(jobs, results, strict=True):
        message = jobs[name][1]
        if message is None:
            assert "error" not in result, (name, result["error"])
            (rank,) = result["ranks"]
            assert rank["weights_compared"] == ("quick" if "quick" in name else "full")
        else:
            assert message in result.get("error", "accepted"), name
        if name in ("model", "removed", "without the removed shard"):
            check_equal(result, root / "model", Case("llama", REMOVED))
    said = (tmp_path / "output.log").read_text(errors="replace")
    assert said.count("Weights compared with the manifest: full digest") == 3
    assert said.count("Weights compared with the manifest: quick digest") == 2


def test_ranks_compare_it_too(root: Path, tmp_path: Path) -> None:
    names = ("model", "row")
    jobs = [engine_job(root, name, full=True, tensor_parallel_size=2) for name in names]
    good, bad = run_jobs(jobs, tmp_path, VLLM_CPU_OMP_THREADS_BIND="0|1")
    assert [rank["weights_compared"] for rank in good["ranks"]] == ["full", "full"]
    check_equal(good, root / "model", Case("llama", REMOVED))
    assert "error" in bad
    said = (tmp_path / "output.log").read_text(errors="replace")
    assert CHANGES["row"][1] in said
    # One rank compares, for all.
    assert said.count("Weights compared with the manifest: full digest") == 1


def test_a_server_of_other_weights_does_not_start(root: Path, tmp_path: Path) -> None:
    from sleb_bench.server import free_port

    port = free_port()
    asked = [*OPTIONS, "--sleb-verify", "full", *LOCAL, str(port)]
    command = printed_command(root / "row", root / "m.json", *asked)
    code, output = run_until_end(command, port, tmp_path / "log")
    assert code > 0
    assert CHANGES["row"][1] in output, output[-3000:]
