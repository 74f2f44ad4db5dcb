"""The number of blocks for a target speed-up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import Models
from sleb_serve import SelectConfig
from sleb_serve.cli.main import main
from sleb_serve.errors import SlebError
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.roofline.sizes import read_model
from sleb_serve.roofline.target import SpeedTarget, blocks_for

Capture = pytest.CaptureFixture[str]


def arguments(path: Path, output: Path, *options: str) -> list[str]:
    text = ["--calibration", "python-docs", "--sequences", "2", "--sequence-length", "16"]
    return ["select", str(path), "-o", str(output), *text, *options]


@pytest.mark.parametrize("load", ["generation", "prompt"])
@pytest.mark.parametrize("speedup", [1.05, 1.25, 1.6])
def test_it_is_the_first_row_of_the_plan_that_is_fast_enough(
    load: str, speedup: float, capsys: Capture
) -> None:
    counts = ",".join(map(str, range(1, 60)))
    assert main(["plan", "llama-2-70b", "-tp", "2", "--removed", counts, "--json"]) == 0
    dense, *rows = json.loads(capsys.readouterr().out)["predictions"]
    gains = {
        row["removed"]: row["generation"] / dense["generation"]
        if load == "generation"
        else dense["prompt"] / row["prompt"]
        for row in rows
    }
    expected = next(removed for removed, gain in gains.items() if gain >= speedup)
    target = SpeedTarget(speedup, gpus=2, load=load)  # type: ignore[arg-type]
    assert blocks_for(read_model("llama-2-70b"), target) == expected


def test_select_removes_so_many(models: Models, tmp_path: Path, capsys: Capture) -> None:
    path, output = models("llama"), tmp_path / "m.json"
    count = blocks_for(read_model(str(path)), SpeedTarget(1.4, "L4"))
    assert 0 < count < 7
    assert main(arguments(path, output, "--target-speedup", "1.4", "--gpu", "L4")) == 0
    assert len(read_manifest(output).removed) == count
    told = f"1.4 times as fast on 1 x L4: remove {count} blocks, according to the roofline"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-speedup", "1e3"], "--target-speedup 1000: 7 of 8 blocks give "),
        (["--target-speedup", "1"], "--target-speedup 1.0: give a number above 1"),
        (["--target-speedup", "nan"], "--target-speedup nan: give a number above 1"),
        (["--target-speedup", "2", "--gpu", "abacus"], "--gpu abacus is not one of A100-40G"),
        (["--target-speedup", "2", "-tp", "3"], "has 4 heads, which it must divide"),
        (["--target-speedup", "2", "--remove", "2"], "both say how many blocks; give one"),
    ],
)
def test_what_cannot_be_had_is_refused(
    options: list[str], message: str, models: Models, tmp_path: Path, capsys: Capture
) -> None:
    assert main(arguments(models("llama"), tmp_path / "m.json", *options)) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_one_of_three_says_how_many() -> None:
    with pytest.raises(SlebError, match="give `remove`, `until` or `target_speedup`"):
        SelectConfig().check()
