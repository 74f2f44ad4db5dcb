"""Other ways to select than the paper's: beam, swap, divergence, samples, repair in the search."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

import oracle
from commands import refused, select_arguments
from conftest import Models
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.cli.main import main
from sleb_serve.data.calibration import make_windows
from sleb_serve.data.tokenizer import load_tokenizer
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.manifest.schema import Manifest
from sleb_serve.models.layerwise import CausalLM
from sleb_serve.models.loading import load_model
from sleb_serve.selection.repair import fit

Capture = pytest.CaptureFixture[str]


def windows_of(path: Path, sequences: int, sample: int = 0) -> tuple[tuple[int, ...], ...]:
    """Some of the windows that `select_arguments` asks for."""
    tokenize = load_tokenizer(open_checkpoint(str(path)))
    whole = make_windows(
        "python-docs", tokenize, sequences=sequences * (sample + 1), sequence_length=32
    )
    return whole.tokens[sequences * sample :]


def selected(path: Path, output: Path, *options: str) -> Manifest:
    assert main(select_arguments(path, output, *options)) == 0
    return read_manifest(output)


@pytest.mark.parametrize("search", ["beam:30", "swap"])
def test_the_other_searches_losses_are_those_of_the_model_with_the_blocks_deleted(
    models: Models, tmp_path: Path, search: str
) -> None:
    path = models("llama")
    windows = windows_of(path, 2)
    manifest = selected(path, tmp_path / "m.json", "--remove", "3", "--search", search)
    assert manifest.selection is not None
    assert manifest.selection.method == f"sleb-{search}"
    for count, removal in enumerate(manifest.removed, 1):
        loss = oracle.loss(oracle.pruned(path, manifest.blocks[:count]), windows)
        assert removal.loss == pytest.approx(loss, rel=1e-5)
    last = manifest.removed[-1].loss
    assert last is not None

    def loss_of(removed: Sequence[int]) -> float:
        return oracle.loss(oracle.pruned(path, sorted(removed)), windows)

    if search == "swap":
        chosen = set(manifest.blocks)
        others = [chosen - {o} | {i} for o in chosen for i in {*range(1, 7)} - chosen]
    else:  # a beam as wide as there are pairs of blocks finds the best set of all
        others = [set(found) for found in itertools.combinations(range(1, 7), 3)]
    assert last <= min(loss_of(list(found)) for found in others) * (1 + 1e-6)


@pytest.mark.parametrize("search", ["beam:3", "swap"])
def test_they_resume_to_the_same_bytes(
    models: Models, tmp_path: Path, capsys: Capture, search: str
) -> None:
    output, log = tmp_path / "m.json", tmp_path / "m.json.search.jsonl"
    options = ["--remove", "3", "--search", search]
    selected(models("llama"), output, *options)
    manifest, whole = output.read_bytes(), log.read_bytes()
    ends = [n for n, line in enumerate(whole.splitlines()) if b'"removed"' in line]
    assert len(ends) > 4
    for steps in (1, 3, len(ends) - 1):
        output.unlink()
        lines = whole.splitlines(keepends=True)[: ends[steps - 1] + 3]  # and two candidates' losses
        log.write_bytes(b"".join(lines))
        capsys.readouterr()
        assert main(select_arguments(models("llama"), output, *options, "--resume")) == 0
        assert capsys.readouterr().err.count("(resumed)") == steps
        assert output.read_bytes() == manifest
        assert log.read_bytes() == whole


def test_the_divergence_can_be_what_is_kept_low(
    models: Models, tmp_path: Path, capsys: Capture
) -> None:
    path = models("opt")
    manifest = selected(path, tmp_path / "m.json", "--remove", "1", "--objective", "kl")
    shown = capsys.readouterr().out
    assert "divergence from the dense model" in shown
    dense, windows = oracle.load(path), windows_of(path, 2)
    expected = {
        block: sum(oracle.divergence(dense, oracle.pruned(path, [block]), w) for w in windows) / 2
        for block in range(1, 5)
    }
    (removal,) = manifest.removed
    assert removal.block == min(expected, key=lambda block: expected[block])
    assert removal.loss == pytest.approx(expected[removal.block], rel=1e-4)
    stored = json.loads((tmp_path / "m.json").read_text())
    assert stored["removed"][0]["perplexity"] is None  # the exponential of a divergence is none
    assert stored["dense"]["loss"] == pytest.approx(0, abs=1e-6)


def test_other_samples_of_the_text_say_how_stable_the_list_is(
    models: Models, tmp_path: Path, capsys: Capture
) -> None:
    path = models("llama")
    manifest = selected(path, tmp_path / "m.json", "--seeds", "3")
    shown = capsys.readouterr().out
    assert manifest.selection is not None
    expected = [
        tuple(block for block, _ in oracle.naive_search(path, windows_of(path, 2, sample), 2))
        for sample in range(3)
    ]
    assert (manifest.blocks, *manifest.selection.samples) == tuple(expected)
    shared = [len(set(expected[0]) & set(other)) for other in expected[1:]]
    assert f"2 other samples of the text remove {shared[0]}, {shared[1]} of these 2" in shown
    again = (tmp_path / "m.json").read_bytes()
    (tmp_path / "m.json").unlink()
    resumed = selected(path, tmp_path / "m.json", "--seeds", "3", "--resume")
    assert "(resumed)" in capsys.readouterr().err
    assert resumed == manifest
    assert (tmp_path / "m.json").read_bytes() == again


def test_blocks_can_be_chosen_by_their_loss_once_repaired(models: Models, tmp_path: Path) -> None:
    """Held against repairing every pruning of the model and looking which is best."""
    path = models("llama")
    options = ["--sequences", "4", "--repair", "fold", "--repair-search", "6"]
    manifest = selected(path, tmp_path / "m.json", *options, "--remove", "1")
    windows = windows_of(path, 4)
    model = CausalLM(load_model(open_checkpoint(str(path)), "float32"), windows[0])
    losses = {block: fit(model, windows, [block])[1] for block in range(1, 7)}
    (removal,) = manifest.removed
    assert removal.block == min(losses, key=lambda block: losses[block])
    assert removal.loss == pytest.approx(losses[removal.block], rel=1e-6)
    assert manifest.repair is not None
    assert manifest.repair.loss == pytest.approx(removal.loss, rel=1e-6)
    narrow = selected(path, tmp_path / "n.json", *options[:-1], "1", "--remove", "1")
    assert narrow.blocks == (oracle.naive_search(path, windows, 1)[0][0],)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--search", "beam"], "--search beam: there are greedy, fast, beam:W, swap"),
        (["--search", "beam:0"], "--search beam:0: there are"),
        (["--search", "greedy:3"], "--search greedy:3: there are"),
        (["--search", "best"], "--search best: there are"),
        (["--seeds", "0"], "--seeds 0: at least one sample"),
        (["--seeds", "90000"], "give more text or smaller --sequences"),
        (["--repair-search", "3"], "give a number and --repair"),
        (["--repair-search", "3", "--repair", "fold", "--search", "swap"], "goes with --search"),
        (["--repair-search", "3", "--repair", "fold", "--objective", "kl"], "goes with --search"),
    ],
)
def test_what_does_not_go_together_is_refused(
    models: Models, tmp_path: Path, capsys: Capture, options: list[str], message: str
) -> None:
    arguments = select_arguments(models("llama"), tmp_path / "m.json", *options)
    assert message in refused(arguments, capsys)
    assert list(tmp_path.iterdir()) == []
