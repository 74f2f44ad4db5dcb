"""Speculative decoding: a pruned model as the target, and as the draft for the dense model."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

import oracle
from conftest import Models
from engines import PROMPTS, Case, check_greedy, overrides, pruning, run_jobs
from exports import manifest_for
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.cli.main import main
from sleb_serve.protocol import FORMAT
from sleb_serve.serving.speculative import draft_folder

pytest.importorskip("vllm")

REMOVED = (2, 5)
REPETITIVE = [[504, 375, 282, 449, 314] * 4]


def run(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Alone: vLLM starts no further engine in a process that had one which speculates."""
    (result,) = run_jobs([{**job, "counters": True, "no_logprobs": True}], folder)
    return result


def test_speculation_by_n_grams_with_the_pruned_model_as_target(
    models: Models, tmp_path: Path
) -> None:
    path = models("llama")
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    job = Case("llama", REMOVED).job(path, speculative_config=ngram, disable_log_stats=False)
    result = run({**job, "prompts": REPETITIVE}, tmp_path)
    check_greedy(result, oracle.pruned(path, REMOVED), REPETITIVE)
    assert result["counters"]["vllm:spec_decode_num_draft_tokens"] > 0


def test_the_pruned_model_drafts_for_its_dense_self(models: Models, tmp_path: Path) -> None:
    """The dense model's answers; and dense and pruned layers, both, have KV cache."""
    path, removed = models("llama"), (6,)
    drafts = draft_folder(open_checkpoint(str(path)), pruning(path, removed), tmp_path / "drafts")
    draft = {
        "method": "draft_model",
        "model": str(drafts),
        "num_speculative_tokens": 3,
        "draft_load_config": {"load_format": FORMAT},
    }
    engine = {"speculative_config": draft, "config_format": FORMAT, "disable_log_stats": False}
    result = run(Case("dense", ()).job(path, **engine), tmp_path)
    check_greedy(result, oracle.load(path), PROMPTS)
    assert result["counters"]["vllm:spec_decode_num_accepted_tokens"] > 0
    (rank,) = result["ranks"]
    drafting = [name for name in rank["kv_cache_layers"] if name.startswith("draft_model.")]
    assert len(drafting) == 7
    assert len(rank["kv_cache_layers"]) == 8 + 7


def test_as_draft_prints_the_dense_model_with_its_pruned_self(
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = models("llama")
    manifest_for(path, REMOVED).write(tmp_path / "m.json")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ["serve", str(path), "-m", str(tmp_path / "m.json"), "--as-draft", "--dry-run"]
    assert main([*arguments, "--draft-tokens", "5", "-tp", "2"]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert "--hf-overrides" not in command
    speculation = json.loads(command[command.index("--speculative-config") + 1])
    (folder,) = (tmp_path / "cache" / "sleb-serve" / "drafts").iterdir()
    assert speculation == {
        "method": "draft_model",
        "model": str(folder),
        "num_speculative_tokens": 5,
        "draft_tensor_parallel_size": 2,
        "draft_load_config": {"load_format": "sleb"},
    }
    assert command[command.index("--config-format") + 1] == "sleb"
    assert "--load-format" not in command
    for option in ("--speculative-config={}", "--spec-model=x", "-sc"):
        assert main([*arguments, option]) == 2
        assert "--as-draft sets up speculative decoding itself" in capsys.readouterr().err


def test_a_draft_folder_is_found_again_and_changes_with_its_content(
    models: Models, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(models("llama")))
    folder = draft_folder(checkpoint, pruning(checkpoint.path, (2, 5)), tmp_path)
    assert draft_folder(checkpoint, pruning(checkpoint.path, (2, 5)), tmp_path) == folder
    other = draft_folder(checkpoint, pruning(checkpoint.path, (2, 6)), tmp_path)
    assert other != folder
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([folder.name, other.name])
    config = json.loads((folder / "config.json").read_text())
    assert [config["sleb"]] == overrides(checkpoint.path, (2, 5))["sleb"]
    # An architecture that no vLLM has: without the plugin the folder must not be served whole.
    assert config["architectures"] == ["SlebLlamaForCausalLM"]
    # To everything of this project the folder is the dense model's.
    seen = open_checkpoint(str(folder))
    assert seen.architecture == checkpoint.architecture
    assert seen.config_sha256() == checkpoint.config_sha256()
    assert seen.weights_sha256() == checkpoint.weights_sha256()


def test_a_draft_is_refused_without_the_plugin(models: Models, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(models("llama")))
    folder = draft_folder(checkpoint, pruning(checkpoint.path, (2, 5)), tmp_path / "drafts")
    draft = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 3}
    whole = {**draft, "draft_load_config": {"load_format": FORMAT}}
    dense = Case("llama", ())
    jobs = [
        dense.job(checkpoint.path, speculative_config=whole, config_format=FORMAT),
        dense.job(checkpoint.path, speculative_config=whole),
        dense.job(folder),
    ]
    results = run_jobs(jobs, tmp_path, VLLM_PLUGINS="none")
    assert "Unknown config format `sleb`" in results[0]["error"]
    assert "['SlebLlamaForCausalLM'] are not supported" in results[1]["error"]
    assert "['SlebLlamaForCausalLM'] are not supported" in results[2]["error"]
