"""Other ways to select than the paper's: by divergence, on several samples of the text."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import oracle
from commands import refused, select_arguments
from conftest import Models
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.cli.main import main
from sleb_serve.data.calibration import make_sequences
from sleb_serve.data.tokenizer import load_tokenizer
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.manifest.schema import Manifest

Capture = pytest.CaptureFixture[str]


def sequences_of(path: Path, sequences: int, sample: int = 0) -> tuple[tuple[int, ...], ...]:
    """Some of the sequences that `select_arguments` asks for."""
    tokenize = load_tokenizer(open_checkpoint(str(path)))
    whole = make_sequences(
        "python-docs", tokenize, sequences=sequences * (sample + 1), sequence_length=32
    )
    return whole.tokens[sequences * sample :]


def selected(path: Path, output: Path, *options: str) -> Manifest:
    assert main(select_arguments(path, output, *options)) == 0
    return read_manifest(output)


def test_the_divergence_can_be_what_is_kept_low(
    models: Models, tmp_path: Path, capsys: Capture
) -> None:
    path = models("opt")
    manifest = selected(path, tmp_path / "m.json", "--remove", "1", "--objective", "kl")
    shown = capsys.readouterr().out
    assert "divergence from the dense model" in shown
    dense, sequences = oracle.load(path), sequences_of(path, 2)
    expected = {
        block: sum(oracle.divergence(dense, oracle.pruned(path, [block]), w) for w in sequences) / 2
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
        tuple(block for block, _ in oracle.naive_search(path, sequences_of(path, 2, sample), 2))
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


@pytest.mark.slow
def test_blocks_go_until_the_perplexity_is_too_high(
    smollm2: Path, tmp_path: Path, capsys: Capture
) -> None:
    """As many as a search without the limit takes to go beyond it; resumed, the same bytes."""
    text = ("--sequence-length", "64")
    path, whole, part = smollm2, tmp_path / "whole.json", tmp_path / "part.json"
    assert main(select_arguments(path, whole, "--remove", "3", *text)) == 0
    manifest = read_manifest(whole)
    assert manifest.dense_loss is not None
    ratios = [math.exp((r.loss or 0.0) - manifest.dense_loss) for r in manifest.removed]
    assert ratios[0] < ratios[1] < ratios[2]
    assert ratios[1] > 1
    limit = (ratios[1] + ratios[2]) / 2
    arguments = select_arguments(path, part, "--until", f"perplexity<{limit:.6f}x", *text)
    at = arguments.index("--remove")
    del arguments[at : at + 2]
    assert main(arguments) == 0
    found = read_manifest(part)
    assert found.removed == manifest.removed[:2]
    before = part.read_bytes()
    part.unlink()
    assert main([*arguments, "--resume"]) == 0
    assert part.read_bytes() == before
    capsys.readouterr()
    for wrong in ("1.15", "perplexity<x", "loss<1.1x", "perplexity<1x"):
        line = refused(select_arguments(path, tmp_path / "n.json", "--until", wrong), capsys)
        assert "--until" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--search", "beam:2"], "choose from"),
        (["--seeds", "0"], "--seeds 0: give 1 to 1000 samples of the text"),
        (["--seeds", "1000", "--sequences", "500"], "give more text or smaller --sequences"),
    ],
)
def test_what_does_not_go_together_is_refused(
    models: Models, tmp_path: Path, capsys: Capture, options: list[str], message: str
) -> None:
    arguments = select_arguments(models("llama"), tmp_path / "m.json", *options)
    assert message in refused(arguments, capsys)
    assert list(tmp_path.iterdir()) == []
