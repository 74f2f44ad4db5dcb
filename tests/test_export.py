"""Exported checkpoints: equal to deletion in Transformers and stock vLLM, written atomically."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
import oracle
from commands import refused, run_with_one_thread
from conftest import Models
from engines import PROMPTS, Case, pruning, run_jobs
from exports import exported, manifest_for
from forking import run_fork, start_fork
from memory import measure_memory
from repairs import manifest_of, repaired
from sleb_serve.cli.main import main
from sleb_serve.convert.export import export
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.manifest.repository import MANIFEST_NAME

REMOVED = {"llama": (2, 5), "gemma3": (1, 4), "qwen2": (1, 3), "opt": (2, 4)}


def logits_differ(one: Any, other: Any, prompt: Sequence[int]) -> float:
    ids = torch.tensor([list(prompt)])
    with torch.no_grad():
        pair = [model(ids, use_cache=False).logits for model in (one, other)]
    return float((pair[0] - pair[1]).abs().max())


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2", "opt", "gpt2", "mixtral"])
def test_transformers_loads_what_deletion_makes(models: Models, tmp_path: Path, name: str) -> None:
    removed = REMOVED.get(name, (1, 4))
    source = models(name)
    folder = exported(source, removed, tmp_path / "out")
    found, expected = oracle.load(folder), oracle.pruned(source, removed)
    for prompt in PROMPTS:
        assert logits_differ(found, expected, prompt) < 1e-5
    assert oracle.parameter_counts(found) == oracle.parameter_counts(expected)
    # With a KV cache, too: its layers are numbered anew.
    generated = found.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=6, do_sample=False)
    assert (
        generated[0, len(PROMPTS[0]) :].tolist()
        == oracle.greedy(expected, PROMPTS[0], 6)[: len(generated[0]) - len(PROMPTS[0])]
    )
    copied = {file.name for file in folder.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", MANIFEST_NAME} <= copied
    assert read_manifest(folder / MANIFEST_NAME).blocks == removed


def test_stock_vllm_serves_it_as_the_plugin_serves_the_original(
    models: Models, tmp_path: Path
) -> None:
    pytest.importorskip("vllm")
    plugged = [Case(name, removed).job(models(name)) for name, removed in REMOVED.items()]
    plain = [
        Case(name, ()).job(exported(models(name), removed, tmp_path / name))
        for name, removed in REMOVED.items()
    ]
    (tmp_path / "plugged").mkdir()
    (tmp_path / "plain").mkdir()
    for ours, theirs in zip(
        run_jobs(plugged, tmp_path / "plugged"),
        run_jobs(plain, tmp_path / "plain", VLLM_PLUGINS="none"),
        strict=True,
    ):
        assert "error" not in ours, ours["error"]
        assert "error" not in theirs, theirs["error"]
        assert ours["tokens"] == theirs["tokens"]
        for one, other in zip(ours["logprobs"], theirs["logprobs"], strict=True):
            assert max(abs(a - b) for a, b in zip(one, other, strict=True)) < 1e-3


def test_a_folded_repair_is_put_in_place(models: Models, tmp_path: Path) -> None:
    path = models("llama")
    manifest = manifest_of(path, (2, 3, 6), tmp_path / "fold.json")
    export(path, manifest, tmp_path / "out")
    tensors = load_file(tmp_path / "fold.json.repair.safetensors")
    found, expected = oracle.load(tmp_path / "out"), repaired(path, (2, 3, 6), tensors)
    for prompt in PROMPTS:
        assert logits_differ(found, expected, prompt) < 1e-5


@pytest.mark.parametrize("form", ["int8", "gptq"])
def test_quantised_tensors_are_copied_as_they_are(
    models: Models, tmp_path: Path, form: str
) -> None:
    quantised = getattr(checkpoints, form)(models("llama"), tmp_path / form)
    twin = checkpoints.compacted(quantised, tmp_path / "twin", (2, 5))
    folder = exported(quantised, (2, 5), tmp_path / "out")
    found, expected = (load_file(p / "model.safetensors") for p in (folder, twin))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_tied_weights_stay_tied_and_shards_shards(models: Models, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = tmp_path / "sharded"
    model = AutoModelForCausalLM.from_pretrained(models("gemma3"))
    model.save_pretrained(source, max_shard_size="600KB")
    shards = sorted(file.name for file in source.glob("*.safetensors"))
    assert len(shards) >= 4
    folder = exported(source, (1, 2), tmp_path / "out")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {name: load_file(folder / name) for name in set(index["weight_map"].values())}
    assert {file.name for file in folder.glob("*.safetensors")} == set(found)
    assert index["weight_map"] == {name: file for file in found for name in found[file]}
    total = sum(tensor.nbytes for tensors in found.values() for tensor in tensors.values())
    assert index["metadata"]["total_size"] == total
    again = oracle.load(folder)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        expected = oracle.pruned(models("gemma3"), (1, 2))(ids, use_cache=False).logits
        assert (again(ids).logits - expected).abs().max() < 1e-5


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A Llama checkpoint of 4 shards, 96 MB each, that nobody will load."""
    folder = tmp_path / "large"
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 8, "hidden_size": 2048}
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 32}))
    places: dict[str, str] = {}
    for shard in range(4):
        name = f"model-{shard + 1:05}-of-00004.safetensors"
        tensors = {
            f"model.layers.{layer}.mlp.{part}.weight": torch.full((2048, 2048), float(layer))
            for layer in (2 * shard, 2 * shard + 1)
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        if shard == 0:
            tensors["model.embed_tokens.weight"] = torch.zeros(32, 2048)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def export_arguments(source: Path, folder: Path) -> list[str]:
    manifest = folder.with_suffix(".json")
    manifest_for(source, (1, 4)).write(manifest)
    return ["export", str(source), "-m", str(manifest), "-o", str(folder)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_holds_less_than_two_shards(large: Path, tmp_path: Path) -> None:
    arguments = export_arguments(large, tmp_path / "out")
    log, peak = tmp_path / "log", tmp_path / "peak"
    code = run_fork(measure_memory, log, ["show", arguments[3]], arguments, peak)
    assert code == 0, log.read_text()[-3000:]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 4
    assert int(peak.read_text()) < 2 * (96 << 20)


def test_an_interrupted_export_leaves_nothing_that_looks_finished(
    large: Path, tmp_path: Path
) -> None:
    arguments = export_arguments(large, tmp_path / "out")
    process = start_fork(run_with_one_thread, tmp_path / "log", arguments)
    assert process.pid is not None
    while not list(tmp_path.glob(".out.incomplete-*/*.safetensors")):
        assert process.is_alive()
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "out").exists()
    for left in tmp_path.glob(".out.incomplete-*"):
        assert not (left / "config.json").exists()  # the last to be written
        shutil.rmtree(left)
    assert main(arguments) == 0
    assert (tmp_path / "out" / "config.json").exists()


def test_what_is_there_is_not_written_over(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = models("llama")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    arguments = ["export", str(path), "--removal-list", "[2, 5]", "-o", str(out)]
    assert "it already exists" in refused(arguments, capsys)
    assert [file.name for file in out.iterdir()] == ["mine.txt"]
    assert main([*arguments[:-1], str(tmp_path / "new")]) == 0
    assert "6 blocks" in capsys.readouterr().out
    other = tmp_path / "m.json"
    manifest_for(models("opt"), (2,)).write(other)
    arguments = ["export", str(path), "-m", str(other), "-o", str(tmp_path / "third")]
    assert "architecture expected OPTForCausalLM" in refused(arguments, capsys)
    assert not (tmp_path / "third").exists()


def test_mergekit_makes_the_same_weights(models: Models, tmp_path: Path) -> None:
    tool = shutil.which("mergekit-yaml") or os.environ.get("SLEB_TEST_MERGEKIT", "")
    if not tool:
        pytest.skip("mergekit is not installed")
    path = models("llama")
    config = tmp_path / "merge.yaml"
    arguments = ["export", str(path), "--removal-list", "[2, 3, 6]", "--format", "mergekit"]
    assert main([*arguments, "-o", str(config)]) == 0
    subprocess.run([tool, str(config), str(tmp_path / "merged")], check=True)
    folder = exported(path, (2, 3, 6), tmp_path / "out")
    found, expected = (
        {k: v for file in p.glob("*.safetensors") for k, v in load_file(file).items()}
        for p in (tmp_path / "merged", folder)
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_the_tag_of_the_manifest_inside_is_the_originals(models: Models, tmp_path: Path) -> None:
    folder = exported(models("opt"), (2, 4), tmp_path / "out")
    inside = read_manifest(folder / MANIFEST_NAME).pruning()
    assert inside == pruning(models("opt"), (2, 4))
