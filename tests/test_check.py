"""`sleb-serve check`: memory and savings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from conftest import Models
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.cli.main import main
from sleb_serve.manifest.binding import bind
from sleb_serve.manifest.schema import Manifest, Removal
from sleb_serve.roofline.gpu import GPUS
from sleb_serve.serving import preflight as checking


def write(path: Path, model: Path, *removed: int) -> Path:
    binding = bind(str(model), open_checkpoint(str(model)))
    Manifest(binding, tuple(map(Removal, removed))).write(path)
    return path


def checked(
    capsys: pytest.CaptureFixture[str], manifest: str, model: str, *options: str
) -> tuple[int, dict[str, Any]]:
    code = main(["check", model, "-m", manifest, *options, "--json"])
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    value["status"] = {finding["name"]: finding["status"] for finding in value["findings"]}
    return code, value


def test_what_fits_passes_and_its_sizes_are_those_of_the_tensors(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models("llama")
    manifest = write(tmp_path / "m.json", model, 3, 1)
    code, found = checked(capsys, str(manifest), str(model), "--gpu", "L4", "-tp", "2")
    assert (code, found["passed"]) == (0, True)
    weights = load_file(model / "model.safetensors")
    gone = sum(t.nbytes for n, t in weights.items() if ".layers.1." in n or ".layers.3." in n)
    dense = sum(tensor.nbytes for tensor in weights.values())
    assert found["sizes"]["weights_bytes"] == {"dense": dense, "pruned": dense - gone}
    config = json.loads((model / "config.json").read_text())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    token = 2 * config["num_key_value_heads"] * head * 2
    free = 0.9 * 2 * GPUS["L4"].memory
    assert found["sizes"]["kv_cache_tokens"] == {
        "dense": int((free - dense) / (8 * token)),
        "pruned": int((free - dense + gone) / (6 * token)),
    }
    assert main(["check", str(model), "-m", str(manifest)]) == 0
    assert "6 of 8 blocks stay" in capsys.readouterr().out


def test_shards_that_need_not_be_read_are_named(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    model = tmp_path / "sharded"
    shutil.copytree(models("llama"), model)
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    shards: dict[str, dict[str, Any]] = {"a.safetensors": {}, "b.safetensors": {}}
    for name, tensor in weights.items():
        shards["b.safetensors" if ".layers.3." in name else "a.safetensors"][name] = tensor
    for name, tensors in shards.items():
        save_file(tensors, model / name, {"format": "pt"})
    index = {name: file for file, tensors in shards.items() for name in tensors}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    manifest = write(tmp_path / "m.json", model, 3, 1)
    code, found = checked(capsys, str(manifest), str(model))
    assert code == 0
    assert found["sizes"]["shards_not_read"] == ["b.safetensors"]
    code, found = checked(capsys, str(manifest), str(model), "--blocks", "1")
    assert found["sizes"]["shards_not_read"] == ["b.safetensors"]


def test_what_does_not_fit_fails_by_name(
    models: Models,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, other = models("llama"), models("opt")
    manifest = write(tmp_path / "m.json", model, 3)
    code, found = checked(capsys, str(manifest), str(other))
    assert (code, found["passed"], found["status"]["model"]) == (1, False, "failed")
    code, found = checked(capsys, str(manifest), str(model), "-tp", "3")
    assert (code, found["status"]["tensor parallelism"]) == (1, "failed")
    tiny = GPUS["L4"].__class__("tiny", 1.0, 1.0, 1000.0, 1.0)
    assert not checking.check(
        str(model), Manifest(bind(str(model), open_checkpoint(str(model))), (Removal(3),)), tiny, 1
    ).passed
    monkeypatch.setattr(checking, "vllm_version", lambda: "0.11.0")
    monkeypatch.setattr("sleb_serve.serving.command.vllm_version", lambda: "0.11.0")
    monkeypatch.setattr(
        "sleb_serve.compat.vllm_versions.fingerprints", lambda root: {"a symbol": ""}
    )
    code, found = checked(capsys, str(manifest), str(model))
    assert (code, found["status"]["vLLM"]) == (1, "failed")


def test_without_vllm_it_checks_what_it_can(
    models: Models,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checking, "vllm_version", lambda: None)
    manifest = write(tmp_path / "m.json", models("llama"), 3)
    code, found = checked(capsys, str(manifest), str(models("llama")))
    assert (code, found["status"]["vLLM"]) == (0, "unknown")


def test_an_architecture_that_cannot_be_served_fails(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    model = tmp_path / "jamba"
    shutil.copytree(models("llama"), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "architectures": ["JambaForCausalLM"]})
    )
    manifest = write(tmp_path / "m.json", model, 3)
    code, found = checked(capsys, str(manifest), str(model))
    assert (code, found["status"]["architecture"]) == (1, "failed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--gpu", "A101"], "--gpu A101 is not one of"), (["--blocks", "2"], "--blocks 2")],
)
def test_a_check_that_cannot_be_made_is_refused(
    models: Models,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    manifest = write(tmp_path / "m.json", models("llama"), 3)
    assert main(["check", str(models("llama")), "-m", str(manifest), *arguments]) == 2
    assert message in capsys.readouterr().err
