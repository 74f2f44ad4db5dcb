"""Selecting, evaluating and exporting other than plain text models, and published oddities."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
import oracle
import tiny_multimodal
import tiny_pooling
from commands import refused
from conftest import save_model, save_tiny
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.cli.main import main
from sleb_serve.cut.config import Cut
from sleb_serve.cut.servable import check_servable, exported_config
from sleb_serve.data.calibration import make_sequences
from sleb_serve.data.tokenizer import load_tokenizer
from sleb_serve.errors import SlebError
from sleb_serve.manifest.reader import read_manifest

TEXT = ["--calibration", "python-docs", "--sequences", "2", "--sequence-length", "48"]
IDS = torch.randint(5, 250, (1, 80), generator=torch.Generator().manual_seed(0))


def edit(path: Path, drop: Sequence[str] = (), **put: Any) -> None:
    file = path / "config.json"
    config = {k: v for k, v in json.loads(file.read_text()).items() if k not in drop}
    file.write_text(json.dumps({**config, **put}, indent=1))


def build(name: str, path: Path) -> Path:
    """A model of which a table of keys would be wrong, as it is published."""
    if name == "gemma2, kinds by position":
        save_model("gemma2", path)
        edit(path, drop=["layer_types"])
    elif name == "gemma3, a number for layer_types":
        save_model("gemma3", path)
        edit(path, drop=["layer_types"], sliding_window_pattern=2)
    elif name == "gemma4, wider heads":
        save_model("gemma4", path, global_head_dim=64)
    elif name == "gemma4, per-layer embeddings":
        save_model("gemma4", path, hidden_size_per_layer_input=16)
    elif name == "gemma4, shared keys and values":
        save_model("gemma4", path, num_kv_shared_layers=2)
    elif name == "minicpm3":
        save_model("minicpm3", path)
    elif name == "qwen2_vl, flat":
        tiny_multimodal.save("qwen2_vl", path)
        tiny_multimodal.published("qwen2_vl", path)
    else:
        tiny_multimodal.save(name, path)
    return path


KINDS = {
    "gemma2, kinds by position": (1, 4),
    "gemma3, a number for layer_types": (1, 4),
    "gemma4, wider heads": (1, 2),
    "gemma4, per-layer embeddings": (1, 3),
    "gemma4, shared keys and values": (0, 4),
    "minicpm3": (1, 3),
    "qwen2_vl, flat": (1, 3),
    "llava": (1, 4),
}


@pytest.fixture(scope="module", params=sorted(KINDS))
def kind(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    name: str = request.param
    return name, build(name, tmp_path_factory.mktemp("kind") / "model")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS, use_cache=False).logits
    return found


def test_an_export_is_the_model_with_the_blocks_skipped(
    kind: tuple[str, Path], tmp_path: Path
) -> None:
    name, path = kind
    out = tmp_path / "out"
    assert (
        main(["export", str(path), "--removal-list", str(list(KINDS[name])), "-o", str(out)]) == 0
    )
    expected = logits(oracle.pruned(path, KINDS[name]))
    assert (logits(oracle.load(out)) - expected).abs().max() < 1e-5
    assert expected.abs().max() > 0.1


def test_the_losses_of_a_search_are_those_of_blocks_skipped(
    kind: tuple[str, Path], tmp_path: Path
) -> None:
    _, path = kind
    output = tmp_path / "m.json"
    assert main(["select", str(path), "-o", str(output), "--remove", "2", *TEXT]) == 0
    manifest = read_manifest(output)
    sequences = make_sequences(
        "python-docs", load_tokenizer(open_checkpoint(str(path))), sequences=2, sequence_length=48
    ).tokens
    model = oracle.load(path)
    assert manifest.dense_loss == pytest.approx(oracle.loss(model, sequences), abs=1e-4)
    for count, removal in enumerate(manifest.removed, 1):
        skipped = oracle.pruned(path, manifest.blocks[:count])
        assert removal.loss == pytest.approx(oracle.loss(skipped, sequences), abs=1e-4)
    # The first choice is the best of those that can go.
    losses = {}
    for block in range(1, 5):
        try:
            check_servable(open_checkpoint(str(path)), Cut(6, (block,)))
        except SlebError:
            continue
        losses[block] = oracle.loss(oracle.pruned(path, (block,)), sequences)
    assert manifest.blocks[0] == min(losses, key=lambda block: losses[block])


def test_a_perplexity_is_that_of_blocks_skipped(kind: tuple[str, Path], tmp_path: Path) -> None:
    name, path = kind
    output = tmp_path / "e.json"
    options = ["--perplexity", "python-docs", "--sequence-length", "48", "--sequences", "2"]
    options += ["--no-answers"]
    blocks = str(list(KINDS[name]))
    assert main(["eval", str(path), "--removal-list", blocks, *options, "-o", str(output)]) == 0
    found = json.loads(output.read_text())["results"][0]["perplexity"]["python-docs"]
    tokenize = load_tokenizer(open_checkpoint(str(path)))
    sequences = make_sequences("python-docs", tokenize, sequences=2, sequence_length=48).tokens
    expected = oracle.loss(oracle.pruned(path, KINDS[name]), sequences)
    assert found == pytest.approx(float(torch.tensor(expected).exp()), rel=1e-3)


@pytest.mark.parametrize("name", ["qwen3_embed", "llama_classify", "bert_embed"])
def test_a_pooling_model_is_selected_by_the_distance_of_its_states(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = tmp_path / "model", tmp_path / "m.json"
    save_tiny(name, tiny_pooling.TINY[name], path)
    arguments = ["select", str(path), "-o", str(output), "--remove", "2", *TEXT]
    assert main(arguments) == 0
    manifest = read_manifest(output)
    assert manifest.selection is not None
    assert manifest.selection.objective == "embedding"
    sequences = make_sequences(
        "python-docs", load_tokenizer(open_checkpoint(str(path))), sequences=2, sequence_length=48
    ).tokens

    def states(removed: Sequence[int]) -> list[torch.Tensor]:
        model = oracle.skip_blocks(tiny_pooling.load(name, path), removed)
        with torch.no_grad():
            return [
                model.base_model(torch.tensor([sequence])).last_hidden_state[0]
                for sequence in sequences
            ]

    dense = states(())
    for count, removal in enumerate(manifest.removed, 1):
        far = [
            float((1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)).mean())
            for a, b in zip(dense, states(manifest.blocks[:count]), strict=True)
        ]
        assert removal.loss == pytest.approx(sum(far) / len(far), abs=1e-5)
    assert main(["export", str(path), "-m", str(output), "-o", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert "needs token predictions" in refused([*arguments, "--objective", "nll"], capsys)


def test_what_vllm_would_run_otherwise_is_exported_for_transformers_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model"
    save_model("gpt_oss", path)
    export = ["export", str(path), "-o", str(tmp_path / "out"), "--removal-list"]
    line = refused([*export, "[1, 3]"], capsys)
    assert "vLLM derives the kind of a layer of GptOssForCausalLM from its number" in line
    assert main([*export, "[1, 3]", "--for", "transformers"]) == 0
    expected = logits(oracle.pruned(path, (1, 3)))
    assert (logits(oracle.load(tmp_path / "out")) - expected).abs().max() < 1e-5
    # Without a pair of layers all that stay keep their kind.
    assert exported_config(open_checkpoint(str(path)), Cut(6, (2, 3)))["num_hidden_layers"] == 4


@pytest.mark.parametrize("form", ["llama.cpp", "mergekit"])
@pytest.mark.parametrize("name", ["gemma2, kinds by position", "gemma3, a number for layer_types"])
def test_other_tools_are_not_asked_for_what_they_cannot_say(
    name: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = build(name, tmp_path / "model")
    export = ["export", str(path), "--format", form, "-o", "-", "--removal-list"]
    assert "would have another layer" in refused([*export, "[1, 4]"], capsys)
    assert main([*export, "[2, 3]"]) == 0


def test_all_of_a_tokenizers_chat_templates_are_exported(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = tmp_path / "model"
    save_model("llama", path)
    made = AutoTokenizer.from_pretrained(path)
    made.chat_template = {"default": "PLAIN", "tool_use": "TOOLS {{ messages[0]['content'] }}"}
    made.save_pretrained(path)
    assert main(["export", str(path), "--removal-list", "[2]", "-o", str(tmp_path / "out")]) == 0
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "hello"}]
    text = found.apply_chat_template(chat, chat_template="tool_use", tokenize=False)
    assert text == "TOOLS hello"


def test_layers_for_multi_token_prediction_follow_the_last_that_stays(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_model("glm4_moe", path, num_nextn_predict_layers=1)
    tensors = load_file(path / "model.safetensors")
    last = {k.replace(".5.", ".6.", 1): v.clone() for k, v in tensors.items() if ".layers.5." in k}
    save_file({**tensors, **last}, path / "model.safetensors", metadata={"format": "pt"})
    assert main(["export", str(path), "--removal-list", "[1, 3]", "-o", str(tmp_path / "out")]) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name.split(".")[2] for name in found if ".layers." in name} == set("01234")
    assert torch.equal(
        found["model.layers.4.mlp.gate.weight"], last["model.layers.6.mlp.gate.weight"]
    )
    expected = logits(oracle.pruned(path, (1, 3)))
    assert (logits(oracle.load(tmp_path / "out")) - expected).abs().max() < 1e-5


def test_quantised_layers_that_are_named_by_patterns_stay_as_they_were(tmp_path: Path) -> None:
    save_model("llama", tmp_path / "plain")
    path = checkpoints.int8(tmp_path / "plain", tmp_path / "model")
    dense = load_file(tmp_path / "plain" / "model.safetensors")
    mixed = {k: v for k, v in load_file(path / "model.safetensors").items() if ".6." not in k}
    mixed |= {k: v for k, v in dense.items() if ".layers.6." in k}
    save_file(mixed, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["lm_head", r"re:.*layers\.6\..*"]
    (path / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    assert main(["export", str(path), "--removal-list", "[2, 5]", "-o", str(out)]) == 0
    expected = logits(oracle.pruned(path, (2, 5)))
    found = logits(oracle.load(out))
    assert bool(found.isfinite().all())
    assert (found - expected).abs().max() < 1e-5
