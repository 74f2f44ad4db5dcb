"""Binding of a manifest to a checkpoint: missing weights, another commit, no weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import hub
from commands import Capture, Done, refused, run_in_one
from conftest import save_model
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.cli.main import main
from sleb_serve.manifest.binding import bind
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.manifest.schema import Manifest, Removal

TEXT = ["--calibration", "python-docs", "--sequences", "2", "--sequence-length", "48"]


def test_a_checkpoint_with_weights_of_fewer_layers_is_refused_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, path = tmp_path / "whole", tmp_path / "model"
    save_model("llama", whole)
    shutil.copytree(whole, path)
    tensors = load_file(path / "model.safetensors")
    fewer = {k: v for k, v in tensors.items() if ".layers.6." not in k and ".layers.7." not in k}
    save_file(fewer, path / "model.safetensors", metadata={"format": "pt"})
    manifest = tmp_path / "m.json"
    Manifest(bind(str(whole), open_checkpoint(str(whole))), (Removal(2),)).write(manifest)
    asked = {
        "import": ["import", str(path), "[1, 3]", "-o", str(tmp_path / "n.json")],
        "select": ["select", str(path), "-o", str(tmp_path / "n.json"), "--remove", "2", *TEXT],
        "eval": ["eval", str(path), "--perplexity", "python-docs"],
        "export": ["export", str(path), "--removal-list", "[1]", "-o", str(tmp_path / "out")],
        "serve": ["serve", str(path), "-m", str(manifest), "--dry-run"],
        "bench": ["bench", str(path), "-m", str(manifest), "-o", str(tmp_path / "bench")],
    }
    for command, arguments in asked.items():
        line = refused(arguments, capsys)
        assert "counts 8 layers and the checkpoint has weights of 6" in line, command
    capsys.readouterr()
    assert main(["check", str(path), "-m", str(manifest)]) == 1
    assert "counts 8 layers and the checkpoint has weights of 6" in capsys.readouterr().out
    assert not (tmp_path / "n.json").exists()


def test_a_hub_model_is_the_manifests_revision_and_a_moved_branch_is_refused(
    tmp_path: Path,
) -> None:
    """Selected at one commit; main points to another fine-tune of the same shape since."""
    before, after = tmp_path / "before", tmp_path / "after"
    save_model("opt", before)
    shutil.copytree(before, after)
    tensors = {k: v + 0.01 for k, v in load_file(before / "model.safetensors").items()}
    save_file(tensors, after / "model.safetensors", metadata={"format": "pt"})
    old, new = "a" * 40, "b" * 40
    manifest = tmp_path / "m.json"

    def run(address: str, commands: list[list[str]]) -> list[Done]:
        environment = hub.environment(address, tmp_path / "cache")
        return run_in_one(commands, tmp_path / "run", **environment)

    with hub.serving("org/tiny", before, old) as (address, _):
        (done,) = run(address, [["import", "org/tiny", "[2, 4]", "-o", str(manifest)]])
        assert done.code == 0, done.error
    assert read_manifest(manifest).model.revision == old
    text = ["--perplexity", "python-docs", "--sequence-length", "48", "--sequences", "1"]
    text += ["--no-answers"]
    asked = {
        "check": ["check", "org/tiny", "-m", str(manifest)],
        "eval": ["eval", "org/tiny", "-m", str(manifest), *text],
        "export": ["export", "org/tiny", "-m", str(manifest), "-o", str(tmp_path / "out")],
        "serve": ["serve", "org/tiny", "-m", str(manifest), "--dry-run"],
    }
    moved = [[a.replace("/out", "/out2") for a in command] for command in asked.values()]
    moved = [[*command, "--revision", "main"] for command in moved]
    with hub.serving("org/tiny", after, new, {old: before}) as (address, _):
        done_of = dict(
            zip(
                [*asked, *(f"{name}, moved" for name in asked)],
                run(address, [*asked.values(), *moved]),
                strict=True,
            )
        )
    for command in asked:
        done = done_of[command]
        assert done.code == 0, (command, done.error)
        if command == "serve":
            assert f"--revision {old}" in done.out
        done = done_of[f"{command}, moved"]
        assert done.code in (1, 2), (command, done)
        expected = "commit expected" if command == "check" else "weights_sha256 expected"
        assert expected in done.out + done.error, (command, done)


def test_check_does_not_say_that_weights_match_which_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    path = tmp_path / "model"
    save_model("opt", path)
    manifest = tmp_path / "m.json"
    Manifest(bind(str(path), open_checkpoint(str(path))), (Removal(2),)).write(manifest)
    commit = "c" * 40
    root = tmp_path / "cache" / "models--org--tiny"
    (root / "snapshots" / commit).mkdir(parents=True)
    shutil.copy(path / "config.json", root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    # What HF_HUB_CACHE says, to a library that has read it already.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    main(["check", "org/tiny", "-m", str(manifest)])
    out, error = capsys.readouterr()
    assert "config matches; weights are not on this machine" in out, error
    assert "weights match" not in out
