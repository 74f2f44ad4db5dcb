"""Speculative decoding: a pruned model as the target, and as the draft for the dense model."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

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


def run(job: dict[str, Any], folder: Path, **environment: str) -> dict[str, Any]:
    """Alone: vLLM starts no further engine in a process that had one which speculates."""
    (result,) = run_jobs([{**job, "counters": True, "no_logprobs": True}], folder, **environment)
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


def drafted(
    path: Path, source: Path, removed: Sequence[int], folder: Path, **more: Any
) -> dict[str, Any]:
    """A job of the model at `path` with a pruned draft whose folder is made of `source`."""
    drafts = draft_folder(open_checkpoint(str(source)), pruning(source, removed), folder / "drafts")
    draft = {
        "method": "draft_model",
        "model": str(drafts),
        "num_speculative_tokens": 3,
        "draft_tensor_parallel_size": more.get("tensor_parallel_size", 1),
        "draft_load_config": {"load_format": FORMAT},
    }
    engine = {"speculative_config": draft, "config_format": FORMAT, "disable_log_stats": False}
    return Case("dense", ()).job(path, **engine, **more)


def tuned(path: Path, folder: Path) -> Path:
    """A copy of a checkpoint with other weights."""
    shutil.copytree(path, folder)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith("down_proj.weight"):
            weights[name] *= 1.1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def check_shared(draft: dict[str, Any], kept: Sequence[int]) -> None:
    """The draft has the dense model's modules, and those that it was built with are gone."""
    found = {**draft["shared"], **draft["norms"]}
    assert len(draft["shared"]) == draft["in_target"] - 2 * 4
    assert len(draft["norms"]) == 6 * 2
    for name, dense in found.items():
        layer = re.match(r"model\.layers\.(\d+)(\..*)", name)
        assert dense == (f"model.layers.{kept[int(layer[1])]}{layer[2]}" if layer else name)
    assert draft["states"] == []
    assert draft["in_memory"] == draft["in_target"]


def test_the_pruned_model_drafts_for_its_dense_self(models: Models, tmp_path: Path) -> None:
    """The dense model's answers; and dense and pruned layers, both, have KV cache.

    The draft has no weights of its own. So it still fits after others are loaded in place.
    """
    path, other = models("llama"), tuned(models("llama"), tmp_path / "tuned")
    result = run({**drafted(path, path, (2, 4), tmp_path), "reload": str(other)}, tmp_path)
    check_greedy(result, oracle.load(other), PROMPTS)
    assert result["counters"]["vllm:spec_decode_num_accepted_tokens"] > 0
    (rank,) = result["ranks"]
    drafting = [name for name in rank["kv_cache_layers"] if name.startswith("draft_model.")]
    assert len(drafting) == 6
    assert len(rank["kv_cache_layers"]) == 8 + 6
    check_shared(rank["draft"], (0, 1, 3, 5, 6, 7))
    said = re.findall(r"draft shares (\d+) bytes .*, (\d+) bytes are", output(tmp_path))
    counts = oracle.parameter_counts(oracle.pruned(path, (2, 4)))
    assert said in [[(str(4 * count), "0")] for count in counts]


def test_a_draft_of_other_files_keeps_weights_of_its_own(models: Models, tmp_path: Path) -> None:
    path, other = models("llama"), tuned(models("llama"), tmp_path / "tuned")
    result = run(drafted(path, other, (2, 4), tmp_path), tmp_path)
    check_greedy(result, oracle.load(path), PROMPTS)
    assert result["counters"]["vllm:spec_decode_num_accepted_tokens"] > 0
    draft = result["ranks"][0]["draft"]
    assert set(draft["shared"].values()) | set(draft["norms"].values()) == {None}
    assert draft["in_memory"] == draft["in_target"] + len(draft["shared"])
    assert "keeps weights of its own: its files are not those of the dense" in output(tmp_path)


@pytest.mark.slow
def test_each_rank_shares_its_own_part(models: Models, tmp_path: Path) -> None:
    path = models("llama")
    job = drafted(path, path, (2, 4), tmp_path, tensor_parallel_size=2)
    result = run(job, tmp_path, VLLM_CPU_OMP_THREADS_BIND="0|1")
    check_greedy(result, oracle.load(path), PROMPTS)
    assert result["counters"]["vllm:spec_decode_num_accepted_tokens"] > 0
    assert len(result["ranks"]) == 2
    for rank in result["ranks"]:
        check_shared(rank["draft"], (0, 1, 3, 5, 6, 7))


def output(folder: Path) -> str:
    return (folder / "output.log").read_text(errors="replace")


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
