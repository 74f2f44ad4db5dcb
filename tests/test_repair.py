"""Repair: the fit against least squares on Transformers' own states, and vLLM serving it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import oracle
from conftest import Models, save_model
from repairs import fitted, manifest_of, repaired
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.cli.main import main
from sleb_serve.errors import SlebError
from sleb_serve.manifest.blocks import gaps
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.manifest.repair_file import sidecar_path
from sleb_serve.models.layerwise import CausalLM
from sleb_serve.models.loading import load_model
from sleb_serve.selection.repair import fit
from sweeps import random_windows

REMOVED = (2, 3, 6)


def test_gaps_are_runs_of_removed_blocks() -> None:
    assert gaps([6, 3, 2]) == ((2, 3), (6, 6))
    assert gaps([0]) == ((0, 0),)


def test_the_first_gap_is_weighted_ridge_regression_on_the_dense_models_states(
    models: Models,
) -> None:
    """Held against numpy's least squares on states that Transformers gives out."""
    path = models("llama")
    gap = fitted(path, REMOVED)[0]
    assert (gap.first, gap.last) == (2, 3)
    model = oracle.load(path)
    inputs: list[torch.Tensor] = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0][0])
    )
    before, after = [], []
    with torch.no_grad():
        for sequence in random_windows(20, 240):
            states = model.model(torch.tensor([sequence]), output_hidden_states=True).hidden_states
            before.append(states[2][0])
            after.append(states[4][0])
    entering, leaving = (torch.cat(part).double().numpy() for part in (before, after))
    given = torch.cat(inputs).double().numpy()
    root = 1 / np.linalg.norm(leaving, axis=1, keepdims=True)
    strength = gap.ridge * np.mean(np.square(given * root).sum(0))
    penalty = np.sqrt(strength) * np.eye(given.shape[1])
    zeros = np.zeros((given.shape[1], entering.shape[1]))
    expected = np.linalg.lstsq(
        np.vstack([given * root, penalty]),
        np.vstack([(leaving - entering) * root, zeros]),
        rcond=None,
    )[0]
    assert gap.name == "model.layers.1.mlp.down_proj.weight"
    own = model.model.layers[1].mlp.down_proj.weight.double().detach().numpy()
    found = (gap.weight.double().numpy() - own).T
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max() + 1e-6


def test_a_repair_brings_the_states_closer_to_the_dense_ones(models: Models) -> None:
    """On text that nothing was fitted to, behind the last gap."""
    path = models("llama")
    tensors = {gap.name: gap.weight for gap in fitted(path, REMOVED)}
    sequence = torch.tensor(random_windows(1, 48, seed=9))
    with torch.no_grad():
        goal = oracle.load(path).model(sequence, use_cache=False).last_hidden_state
        plain = oracle.pruned(path, REMOVED).model(sequence, use_cache=False).last_hidden_state
        mended = repaired(path, REMOVED, tensors).model(sequence, use_cache=False).last_hidden_state
    assert (mended - goal).norm() < (plain - goal).norm()


def test_what_cannot_be_folded_is_refused(models: Models) -> None:
    with pytest.raises(SlebError, match="does not end in a projection whose output is added"):
        fitted(models("gemma3"), (2,))  # a norm stands behind its projection
    with pytest.raises(SlebError, match="block 0 is removed"):
        fitted(models("llama"), (0, 4))
    sequences = random_windows(3, 48)
    model = CausalLM(load_model(open_checkpoint(str(models("llama"))), "float32"), sequences[0])
    with pytest.raises(SlebError, match="at least 4 sequences"):
        fit(model, sequences, [2])


@pytest.fixture
def select_repaired(models: Models, tmp_path: Path) -> Callable[..., list[str]]:
    def arguments(name: str, *more: str) -> list[str]:
        command = ["select", str(models("llama")), "-o", str(tmp_path / name), "--remove", "2"]
        command += ["--calibration", "python-docs", "--sequences", "4", "--sequence-length", "48"]
        return [*command, "--repair", "fold", *more]

    return arguments


def test_select_writes_the_sidecar_and_a_resumed_search_the_same_bytes(
    select_repaired: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(select_repaired("m.json")) == 0
    shown = capsys.readouterr().out
    assert "repair       fold of 2 removals, fitted on 4 sequences" in shown
    manifest = read_manifest(tmp_path / "m.json")
    assert manifest.repair is not None
    assert manifest.repair.loss is not None
    tensors = load_file(sidecar_path(tmp_path / "m.json"))
    assert set(tensors) == {
        f"model.layers.{first - 1}.mlp.down_proj.weight" for first, _ in gaps(manifest.blocks)
    }
    before = {name: (tmp_path / name).read_bytes() for name in ("m.json", manifest.repair.file)}
    for steps in (1, 2):
        log = tmp_path / "m.json.search.jsonl"
        lines = log.read_text().splitlines(keepends=True)
        ends = [i for i, line in enumerate(lines) if '"removed":' in line and '"step"' in line]
        log.write_text("".join(lines[: ends[steps - 1] + 1]))  # as a kill after that step leaves it
        for name in before:
            (tmp_path / name).unlink()
        assert main(select_repaired("m.json", "--resume")) == 0
        assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_a_folded_weight_has_the_checkpoints_dtype_whatever_was_computed_in(
    tmp_path: Path,
) -> None:
    """Or it could neither be served nor exported in that weight's place."""
    path = tmp_path / "half"
    save_model("llama", path, "bfloat16")
    arguments = ["select", str(path), "-o", str(tmp_path / "m.json"), "--remove", "2"]
    arguments += ["--calibration", "python-docs", "--sequences", "4", "--sequence-length", "48"]
    assert main([*arguments, "--repair", "fold", "--dtype", "float32"]) == 0
    tensors = load_file(sidecar_path(tmp_path / "m.json"))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert (
        main(["export", str(path), "-m", str(tmp_path / "m.json"), "-o", str(tmp_path / "out")])
        == 0
    )


def test_a_sidecar_that_is_not_the_manifests_is_refused_in_one_line(
    select_repaired: Callable[..., list[str]],
    models: Models,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(select_repaired("m.json")) == 0
    assert main([*select_repaired("other.json"), "--early-barrier", "3"]) == 0
    sidecar, other = (sidecar_path(tmp_path / name) for name in ("m.json", "other.json"))
    good = sidecar.read_bytes()
    serve = ["serve", str(models("llama")), "-m", str(tmp_path / "m.json"), "--dry-run"]

    def refusal(*more: str) -> str:
        capsys.readouterr()
        assert main([*serve, *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert main(serve) == 0
    assert "fold" in capsys.readouterr().out
    sidecar.write_bytes(good[:-1])
    assert "is not the manifest's: sha256 expected" in refusal()
    shutil.copy(other, sidecar)
    assert "is not the manifest's: sha256 expected" in refusal()
    sidecar.unlink()
    assert "cannot read the repair" in refusal()
    sidecar.write_bytes(good)
    assert "is repaired for 2 blocks, and another number" in refusal("--blocks", "1")
    text = json.loads((tmp_path / "m.json").read_text())
    text["repairs"][0]["file"] = "../elsewhere.safetensors"
    (tmp_path / "m.json").write_text(json.dumps(text))
    assert "must be a file's name beside the manifest" in refusal()


def test_a_kind_of_repair_that_is_no_more_is_refused_in_one_line(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = models("llama")
    manifest_of(path, (2, 3), tmp_path / "m.json", count=8, length=48)
    text = json.loads((tmp_path / "m.json").read_text())
    capsys.readouterr()
    for kind in ("map", "scale"):
        text["repairs"][0]["kind"] = kind
        (tmp_path / "m.json").write_text(json.dumps(text))
        assert main(["serve", str(path), "-m", str(tmp_path / "m.json"), "--dry-run"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"repairs[0].kind is {kind}, which is no longer served" in line
        assert "select again with --repair fold" in line
