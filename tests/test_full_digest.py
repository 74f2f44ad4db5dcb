"""The full digest of a model's weights: what it finds that the quick one does not, and where."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from changed_weights import CHANGES, REMOVED, changed_models
from commands import Capture, refused, select_arguments
from conftest import Models
from healing import SMALL
from sleb_serve.checkpoint.full_digest import full_digests
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.cli.main import main
from sleb_serve.errors import SlebError
from sleb_serve.healing.config import HealConfig
from sleb_serve.healing.pipeline import heal
from sleb_serve.manifest.binding import check_readable
from sleb_serve.manifest.pruning import Pruning
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.serving.command import serve_command


def plainly(folder: Path) -> tuple[str, ...]:
    """The digests by another way: tensors as safetensors gives them, and no threads."""
    parts: list[list[tuple[str, str, Any]]] = [[] for _ in range(9)]
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "numpy") as opened:
            for name in opened.keys():  # noqa: SIM118
                block = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
                dtype = opened.get_slice(name).get_dtype()
                parts[block + 1].append((name, dtype, opened.get_tensor(name)))
    found = []
    for part in parts:
        digest = hashlib.sha256()
        for name, dtype, tensor in sorted(part, key=lambda entry: entry[0]):
            about = [name, dtype, list(tensor.shape), tensor.nbytes]
            digest.update(json.dumps(about, separators=(",", ":")).encode() + tensor.tobytes())
        found.append(digest.hexdigest())
    return tuple(found)


@pytest.fixture(scope="module")
def root(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return changed_models(models("llama"), tmp_path_factory.mktemp("full"))


def without_digest(root: Path, folder: Path) -> Path:
    manifest = read_manifest(root / "m.json")
    path = folder / "without.json"
    replace(manifest, model=replace(manifest.model, full_sha256=None)).write(path)
    return path


def test_it_is_what_a_plain_hash_of_all_tensors_gives_whatever_the_sharding(root: Path) -> None:
    expected = plainly(root / "model")
    assert len(set(expected)) == 9
    assert read_manifest(root / "m.json").model.full_sha256 == expected
    told: list[tuple[int, int]] = []
    sharded = open_checkpoint(str(root / "sharded"))
    assert sharded.full_sha256(reading=lambda *far: told.append(far)) == expected
    size = sum(tensor.nbytes for tensor in load_file(root / "model/model.safetensors").values())
    assert (told[0], told[-1], told) == ((0, size), (size, size), sorted(told))
    kept = sharded.full_sha256(frozenset({2}))
    assert kept == (*expected[:3], hashlib.sha256().hexdigest(), *expected[4:])
    assert plainly(root / "noise") == open_checkpoint(str(root / "noise")).full_sha256()


@pytest.mark.parametrize("name", CHANGES)
def test_check_finds_any_change_only_when_it_reads_all(
    root: Path, name: str, capsys: Capture
) -> None:
    asked = ["check", str(root / name), "-m", str(root / "m.json")]
    assert main(asked) == 0
    assert "config and weights match (quick digest, of samples)" in capsys.readouterr().out
    assert main([*asked, "--full"]) == 1
    (line,) = [ln for ln in capsys.readouterr().out.splitlines() if ln.startswith("failed")]
    assert CHANGES[name][1] in line
    assert "download the model again" in line
    assert main(["check", str(root / "model"), "-m", str(root / "m.json"), "--full"]) == 0
    said = capsys.readouterr()
    assert "as in the manifest's model: all blocks" in said.out
    assert "reading weights" in said.err


def test_check_compares_what_is_here_of_a_checkpoint_without_removed_shards(
    root: Path, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "sharded"
    shutil.copytree(root / "sharded", path)
    (path / "gone.safetensors").unlink()
    asked = ["check", str(path), "-m", str(root / "m.json"), "--full"]
    assert main(asked) == 0
    assert "weights of removed ones are not on this machine" in capsys.readouterr().out
    (path / "b.safetensors").write_bytes(b"")
    assert main(asked) == 1
    assert "is not a whole safetensors file" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused(root: Path, tmp_path: Path, capsys: Capture) -> None:
    model, manifest = str(root / "model"), without_digest(root, tmp_path)
    lacks = "holds no full digest of its model's weights; make it again"
    assert main(["check", model, "-m", str(manifest)]) == 0
    capsys.readouterr()
    assert lacks in refused(["check", model, "-m", str(manifest), "--full"], capsys)
    full = ["--sleb-verify", "full", "--dry-run"]
    assert lacks in refused(["serve", model, "-m", str(manifest), *full], capsys)
    assert lacks in refused(["serve", model, "--removal-list", "[2]", *full], capsys)
    own = ["serve", model, "-m", str(root / "m.json"), *full]
    assert "--as-draft serves the whole model" in refused([*own, "--as-draft"], capsys)
    assert "invalid choice: 'some'" in refused([*own, "--sleb-verify", "some"], capsys)
    with pytest.raises(SlebError, match="verify=some: choose one of quick, full"):
        serve_command(model, read_manifest(root / "m.json"), verify="some")  # type: ignore[arg-type]


def test_weights_that_are_not_here_are_not_said_to_match(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    commit = "c" * 40
    cache = tmp_path / "models--org--tiny"
    (cache / "snapshots" / commit).mkdir(parents=True)
    shutil.copy(root / "model/config.json", cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    line = refused(["check", "org/tiny", "-m", str(root / "m.json"), "--full"], capsys)
    assert "the weights of org/tiny are not on this machine" in line


def test_a_checkpoint_in_pytorchs_own_format_has_none(
    root: Path, tmp_path: Path, capsys: Capture
) -> None:
    import torch
    from safetensors.torch import load_file as load

    path = tmp_path / "model"
    shutil.copytree(root / "model", path)
    torch.save(load(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    output = tmp_path / "m.json"
    assert main(["import", str(path), "[2, 5]", "-o", str(output)]) == 0
    assert read_manifest(output).model.full_sha256 is None
    capsys.readouterr()
    line = refused(["check", str(path), "-m", str(output), "--full"], capsys)
    assert "make it again, of safetensors" in line


def test_a_file_that_is_cut_short_meanwhile_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(bytes(100))
    with pytest.raises(SlebError, match="became shorter while it was read"):
        full_digests([[("w", "U8", [200], 0, 200, file)]])
    with pytest.raises(SlebError, match=r"cannot read .*none\.safetensors"):
        full_digests([[("w", "U8", [200], 0, 200, tmp_path / "none.safetensors")]])


def test_a_server_is_told_of_kept_blocks_alone_under_the_same_name(root: Path) -> None:
    manifest = read_manifest(root / "m.json")
    quick, full = manifest.pruning(), manifest.pruning(full=True)
    digests = plainly(root / "model")
    assert quick.full_sha256 == ()
    assert full.full_sha256 == tuple(d for b, d in enumerate(digests, -1) if b not in REMOVED)
    assert (quick.digest, quick.compared, full.compared) == (full.digest, "quick", "full")
    content = json.loads(json.dumps(full.to_dict()))
    assert Pruning.from_dict(content) == full
    for broken in ([], digests[:6], ["x"] * 7, "x"):
        with pytest.raises(SlebError, match=r"pruning\.full_sha256"):
            Pruning.from_dict({**content, "full_sha256": broken})


@pytest.mark.parametrize(
    ("reader", "strategy", "extra", "message"),
    [
        ("dummy", None, {}, "--load-format dummy may read other bytes"),
        ("pt", None, {}, "--load-format pt may"),
        ("hf", "eager", {}, "--safetensors-load-strategy eager may"),
        ("hf", None, {"enable_multithread_load": True}, "enable_multithread_load True may"),
        ("safetensors", "prefetch", {}, None),
    ],
)
def test_readers_of_other_bytes_are_refused(
    root: Path, reader: str, strategy: str | None, extra: dict[str, Any], message: str | None
) -> None:
    manifest = read_manifest(root / "m.json")
    check_readable(manifest.pruning(), reader, strategy, extra)
    with nullcontext() if message is None else pytest.raises(SlebError, match=message):
        check_readable(manifest.pruning(full=True), reader, strategy, extra)


def test_select_records_it_and_does_not_resume_on_other_weights(
    root: Path, tmp_path: Path, capsys: Capture
) -> None:
    output, path = tmp_path / "m.json", tmp_path / "model"
    shutil.copytree(root / "model", path)
    assert main(select_arguments(path, output)) == 0
    assert read_manifest(output).model.full_sha256 == plainly(path)
    assert "quick digest; full one recorded" in capsys.readouterr().out
    shutil.copy(root / "byte/model.safetensors", path / "model.safetensors")
    assert "another search" in refused(select_arguments(path, output, "--resume"), capsys)


def test_heal_keeps_it(root: Path, tmp_path: Path) -> None:
    manifest = read_manifest(root / "m.json")
    heal(root / "model", manifest, HealConfig(**SMALL), tmp_path / "h.json")
    assert read_manifest(tmp_path / "h.json").model == manifest.model


def test_a_form_that_only_the_full_digest_tells_from_the_model_can_be_bound(
    root: Path, tmp_path: Path, capsys: Capture
) -> None:
    asked = ["--origin", str(root / "model"), "-o", str(tmp_path / "r.json")]
    assert main(["rebind", str(root / "m.json"), str(root / "noise"), *asked]) == 0
    assert read_manifest(tmp_path / "r.json").model.full_sha256 == plainly(root / "noise")
    capsys.readouterr()
    own = ["rebind", str(root / "m.json"), str(root / "sharded"), *asked]
    assert "is the manifest's own model" in refused(own, capsys)
