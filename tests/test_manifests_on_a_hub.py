"""Manifests in repositories: pushed, read by id, pinned, moved, and refused."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import hub
from commands import Capture, Done, refused, run_in_one
from conftest import ROOT, Models
from engines import Case, run_jobs
from exports import manifest_for
from repairs import manifest_of
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.cli.main import main
from sleb_serve.errors import SlebError
from sleb_serve.evaluation.evaluate import with_evaluation
from sleb_serve.manifest.pruning import Pruning
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.manifest.repository import MANIFEST_NAME, HubFile, hub_file
from sleb_serve.publishing.card import is_ours, model_card
from sleb_serve.serving.command import pruned_overrides
from sleb_serve.serving.options import taken

A, B = "a" * 40, "b" * 40
SIDECAR = "m.json.repair.safetensors"


class Machine:
    """A hub, a machine that asks it, and a manifest with a repair on that machine."""

    def __init__(self, server: hub.Hub, folder: Path) -> None:
        self.hub, self.folder = server, folder

    @property
    def manifest(self) -> Path:
        return self.folder / "m.json"

    def run(self, *commands: Sequence[str], offline: bool = False) -> list[Done]:
        """Run commands with the hub at hand, or without it and from the same cache."""
        asked = hub.environment(self.hub.url, self.folder / "cache")
        if offline:
            asked |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
        return run_in_one(commands, self.folder / "run", **asked)

    def put(self, name: str, commits: dict[str, hub.Files], main: str) -> hub.Repository:
        self.hub.repositories[name] = hub.Repository(commits, main)
        return self.hub.repositories[name]

    def files(self) -> hub.Files:
        """The manifest and its repair, as a repository holds them."""
        return {MANIFEST_NAME: self.manifest, SIDECAR: self.folder / SIDECAR}


@pytest.fixture(scope="module")
def repaired(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a manifest with a repair."""
    folder = tmp_path_factory.mktemp("repaired")
    manifest_of(models("llama"), (2, 5), folder / "m.json")
    return folder


@pytest.fixture
def machine(repaired: Path, tmp_path: Path) -> Iterator[Machine]:
    for name in ("m.json", SIDECAR):
        (tmp_path / name).write_bytes((repaired / name).read_bytes())
    with hub.running() as server:
        yield Machine(server, tmp_path)


def served(done: Done) -> tuple[list[str], Pruning]:
    """The command that --dry-run printed, but for the overrides; and what these remove."""
    assert done.code == 0, done.error
    rest, (overrides,) = taken(shlex.split(done.out.splitlines()[-1]), "--hf-overrides")
    assert overrides is not None
    pruning = Pruning.of_config(json.loads(overrides))
    assert pruning is not None
    return rest, pruning


def test_what_is_pushed_is_served_by_its_id_with_the_hub_and_without(
    machine: Machine, models: Models
) -> None:
    path = str(models("llama"))
    local = read_manifest(machine.manifest)
    (pushed,) = machine.run(["push", str(machine.manifest), "org/tiny-sleb"])
    assert pushed.code == 0, pushed.error
    name = pushed.out.split()[-1]
    commit = machine.hub.repositories["org/tiny-sleb"].names["main"]
    assert name == f"hf://org/tiny-sleb@{commit}/{MANIFEST_NAME}"
    by_id, pinned = ["-m", "org/tiny-sleb"], ["-m", f"hf://org/tiny-sleb@{commit}"]
    asked = [["serve", path, *given, "--dry-run"] for given in (by_id, pinned)]
    *first, shown = machine.run(*asked, ["show", "org/tiny-sleb"])
    assert f"read from    {name}" in shown.out
    machine.hub.shutdown()
    machine.hub.server_close()
    second = machine.run(*asked, offline=True)
    commands = [served(done) for done in (*first, *second)]
    assert commands == commands[:1] * 4
    assert name in first[0].error
    pruning = commands[0][1]
    assert (pruning.digest, pruning.tag) == (local.pruning().digest, local.pruning().tag)
    assert pruning.repair is not None
    lies = Path(pruning.repair.path)
    assert lies.is_relative_to(machine.folder / "cache")
    assert lies.parent.name == commit
    assert lies.read_bytes() == (machine.folder / SIDECAR).read_bytes()


def test_a_name_that_has_moved_is_told_and_a_commit_stays(machine: Machine, models: Models) -> None:
    first, second = (manifest_for(models("llama"), blocks) for blocks in ((2, 5), (2, 6)))
    commits: dict[str, hub.Files] = {
        A: {MANIFEST_NAME: first.to_json()},
        B: {MANIFEST_NAME: second.to_json()},
    }
    own = machine.put("org/moves", commits, A)
    own.names["v1"] = A
    show = ["show", "hf://org/moves@v1", "--json"]
    (before,) = machine.run(show)
    own.names["v1"] = B
    after, again, pinned = machine.run(show, show, ["show", f"hf://org/moves@{A}", "--json"])
    assert "moved" not in before.error + again.error + pinned.error
    assert "hf://org/moves@v1/sleb_manifest.json has moved" in after.error
    assert "blocks was [2, 5], is [2, 6]" in after.error
    assert f"give hf://org/moves@{A}/" in after.error
    assert before.out == pinned.out != after.out == again.out


def test_what_is_not_as_pinned_or_not_whole_is_refused(machine: Machine, models: Models) -> None:
    whole = machine.files()
    machine.put("org/whole", {A: whole}, A).names[B] = A
    machine.put("org/bare", {A: {MANIFEST_NAME: machine.manifest}}, A)
    machine.put("org/other", {A: {**whole, SIDECAR: b"other weights"}}, A)
    machine.put("org/none", {A: {"README.md": b"# nothing"}}, A)
    expected = {
        f"hf://org/whole@{B}": f"the hub gave commit {A} where {B} was asked for",
        "org/bare": f"cannot read repair hf://org/bare@{A}/{SIDECAR} (404",
        "org/other": "is not the manifest's: sha256 expected",
        "org/none": "cannot read manifest hf://org/none/sleb_manifest.json (404",
        "org/nowhere": "cannot read manifest hf://org/nowhere/sleb_manifest.json (4",
        "hf://org/whole@gone": "cannot read manifest hf://org/whole@gone/sleb_manifest.json (404",
    }
    serve = ["serve", str(models("llama")), "--dry-run", "-m"]
    done = machine.run(*([*serve, name] for name in expected))
    for result, message in zip(done, expected.values(), strict=True):
        assert result.code == 2, message
        assert message in result.error
        assert len(result.error.strip().splitlines()) == 1
        assert result.out == ""
    (offline,) = machine.run([*serve, "org/whole"], offline=True)
    assert "HF_HUB_OFFLINE forbids asking the hub" in offline.error


def test_a_manifest_on_a_hub_is_named_in_results_and_not_written_to(
    machine: Machine, models: Models
) -> None:
    machine.put("org/tiny", {A: machine.files()}, A)
    text = ["--perplexity", "python-docs", "--sequence-length", "48", "--sequences", "1"]
    text += ["--no-answers"]
    ask = ["eval", str(models("llama")), "-m", "org/tiny", *text]
    report = machine.folder / "e.json"
    done, written = machine.run([*ask, "--write-back"], [*ask, "-o", str(report)])
    assert done.code == 2
    assert f"cannot write to hf://org/tiny@{A}/" in done.error
    assert written.code == 0, written.error
    made_from = json.loads(report.read_text())["created_by"]["made_from"]
    assert made_from == f"hf://org/tiny@{A}/{MANIFEST_NAME}"


def test_a_card_of_ones_own_stays_and_a_public_repository_is_not_private(machine: Machine) -> None:
    theirs = b"---\nlicense: mit\n---\n# Mine\n"
    machine.put("org/mine", {A: {"README.md": theirs, "model.safetensors": b"x"}}, A)
    push = ["push", str(machine.manifest)]
    own, private, new, again = machine.run(
        [*push, "org/mine", "--revision", "pruned"],
        [*push, "org/mine", "--private"],
        [*push, "org/new", "--private"],
        [*push, "org/new"],
    )
    assert (own.code, private.code, new.code, again.code) == (0, 2, 0, 0), new.error
    mine = machine.hub.repositories["org/mine"]
    assert mine.names["main"] == A
    assert set(mine.commits) == {A, mine.names["pruned"]}
    files = mine.commits[mine.names["pruned"]]
    assert files["README.md"] == theirs
    assert files.keys() == {"README.md", "model.safetensors", MANIFEST_NAME, SIDECAR}
    assert "org/mine is there already and public" in private.error
    made = machine.hub.repositories["org/new"]
    assert made.private
    assert made.commits[made.names["main"]][MANIFEST_NAME] == machine.manifest.read_bytes()


def test_the_card_says_what_is_removed_and_how_to_serve_it(
    machine: Machine, capsys: Capture
) -> None:
    assert main(["push", str(machine.manifest), "org/tiny-sleb", "--dry-run"]) == 0
    listed, _, card = capsys.readouterr().out.partition("\n\n")
    assert {line.split()[-1] for line in listed.splitlines()} == {
        *(MANIFEST_NAME, "README.md", SIDECAR)
    }
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "sleb-serve"
    assert {"sleb", "depth-pruning", "fold"} <= set(head["tags"])
    assert "base_model" not in head, "a folder's name is no id"
    assert "sleb-serve serve ./llama -m org/tiny-sleb" in card
    assert "2 of 8 blocks" in card
    assert "Not evaluated" in card
    assert not machine.hub.repositories


def test_the_card_of_a_healed_model_says_how_and_how_well(tmp_path: Path) -> None:
    records = ROOT / "benchmarks" / "records" / "healing" / "3"
    report = json.loads((records / "healed.eval.json").read_text())
    healed = with_evaluation(read_manifest(records / "healed.json"), report)
    model = replace(healed.model, id="org/dense", revision=A)
    card = model_card(replace(healed, model=model), "org/healed")
    file = tmp_path / "README.md"
    file.write_text(card)
    assert is_ours(file)
    for theirs in ("---\nlibrary_name: transformers\n---\n", "# plain", "---\n[broken\n---\n"):
        file.write_text(theirs)
        assert not is_ours(file)
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "org/dense"
    assert "heal" in head["tags"]
    assert "sleb-serve serve org/dense -m org/healed" in card
    assert healed.repair is not None
    assert healed.repair.training is not None
    assert f"{healed.repair.training.perplexity['healed']:.2f} healed" in card
    for entry in report["results"]:
        for value in entry["perplexity"].values():
            assert f"{value:.2f}" in card
    broken = replace(healed, evaluation={"hf": {"results": []}})
    with pytest.raises(SlebError, match=r"evaluation.hf is no result"):
        model_card(broken, "org/healed")


@pytest.mark.slow
def test_workers_read_the_repair_from_the_cache(machine: Machine, models: Models) -> None:
    pytest.importorskip("vllm")
    path = models("llama")
    machine.put("org/tiny", {A: machine.files()}, A)
    (done,) = machine.run(["serve", str(path), "-m", f"hf://org/tiny@{A}", "--dry-run"])
    cached, local = served(done)[1], read_manifest(machine.manifest).pruning()
    job = Case("llama", local.removed).job(path)
    jobs = [
        {**job, "overrides": pruned_overrides(pruning, open_checkpoint(str(path)))}
        for pruning in (cached, local, replace(local, repair=None))
    ]
    found, expected, plain = run_jobs(jobs, machine.folder)
    assert "error" not in found, found["error"]
    assert found["logprobs"] == expected["logprobs"] != plain["logprobs"]


def test_what_cannot_be_pushed_is_refused(machine: Machine, capsys: Capture) -> None:
    push = ["push", str(machine.manifest)]
    assert "is no repository's name" in refused([*push, "no/such/name"], capsys)
    assert "is no repository's name" in refused([*push, "name"], capsys)
    assert "HF_HUB_OFFLINE forbids asking the hub" in refused([*push, "org/name"], capsys)
    (machine.folder / SIDECAR).write_bytes(b"short")
    assert "is not the manifest's" in refused([*push, "org/name", "--dry-run"], capsys)
    (machine.folder / SIDECAR).unlink()
    assert "cannot read the repair" in refused([*push, "org/name"], capsys)
    assert not machine.hub.repositories


def test_a_name_means_one_thing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "here").write_text("{}")
    expected = {
        "org/name": HubFile("org/name"),
        "hf://org/here": HubFile("org/here"),
        "hf://org/name@v1": HubFile("org/name", "v1"),
        "hf://org/name@refs%2Fpr%2F1/a/b.json": HubFile("org/name", "refs/pr/1", "a/b.json"),
        "org/here": None,
        "org/name.json": None,
        "m.json": None,
        "./org/name": None,
        "/org/name": None,
        "a/b/c": None,
        "org/name@v1": None,
    }
    for name, file in expected.items():
        assert hub_file(name) == file, name
        if file is not None:
            assert hub_file(str(file)) == file
    for bad in (
        *("name", "org/name/../m.json", "org/name@", "org/name@v1/", "datasets/org/n@a@b", ""),
        *("org/name@..%2F..", "org/name@%2Fetc", "a/b@c/./d"),
    ):
        with pytest.raises(SlebError, match="names no file of a model repository"):
            hub_file(f"hf://{bad}")
