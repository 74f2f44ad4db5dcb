"""A study: from a model to a recommended depth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import Models
from sleb_bench.study_page import depths, recommended
from sleb_serve.cli.main import main
from sleb_serve.manifest.reader import read_manifest

Capture = pytest.CaptureFixture[str]


def entry(blocks: int, agreement: float, accuracy: float) -> dict[str, Any]:
    return {
        "blocks": blocks,
        "perplexity": {"t": 9.0 + blocks},
        "agreement": {"t": agreement} if blocks else {},
        "answers": {},
        "tasks": {"piqa": {"acc": accuracy}},
    }


def report_of_speeds(**intervals: tuple[float, float, float]) -> dict[str, Any]:
    """Of variants named by their blocks, as _2: the ratio of generation and its interval."""
    variants = {"dense": {"blocks": 0}, **{n: {"blocks": int(n[1:])} for n in intervals}}
    ratios = [
        {"variant": name, "over": "dense", "ratio": ratio, "ratio_interval": interval}
        for name, (ratio, *interval) in intervals.items()
    ]
    return {"variants": variants, "workloads": {"decode": {"ratios": ratios}}}


SPEEDS = report_of_speeds(_2=(1.05, 1.02, 1.08), _4=(1.15, 1.12, 1.18), _6=(1.22, 1.2, 1.24))


@pytest.mark.parametrize(
    ("pruned", "healed", "speeds", "expected"),
    [
        # Healing makes four of them safe.
        ({2: (0.95, 0.5), 4: (0.8, 0.5)}, {4: (0.91, 0.5), 6: (0.85, 0.5)}, SPEEDS, (4, "healed")),
        ({2: (0.95, 0.5), 4: (0.95, 0.5)}, {4: (0.95, 0.5)}, SPEEDS, (4, "healed")),
        # Nothing is safe, six are not harmful.
        ({2: (0.8, 0.5), 6: (0.7, 0.5)}, {6: (0.8, 0.48)}, SPEEDS, (6, "healed")),
        # The tasks are lost.
        ({2: (0.95, 0.3)}, {2: (0.95, 0.4)}, SPEEDS, None),
        # Not told apart from dense.
        ({2: (0.95, 0.5)}, {}, report_of_speeds(_2=(1.05, 0.98, 1.12)), None),
    ],
)
def test_the_fastest_depth_that_is_not_harmful_is_recommended(
    pruned: dict[int, tuple[float, float]],
    healed: dict[int, tuple[float, float]],
    speeds: dict[str, Any],
    expected: tuple[int, str] | None,
) -> None:
    evaluations = {
        "pruned": {"results": [entry(0, 1.0, 0.5), *(entry(k, *v) for k, v in pruned.items())]},
        "healed": {"results": [entry(k, *v) for k, v in healed.items()]},
    }
    found = depths(evaluations, speeds)
    assert len(found) == 1 + len(pruned) + len(healed)
    best, why = recommended(found)
    assert (None if best is None else (best.blocks, best.model)) == expected
    assert ("check it" in why) == (best is not None and best.verdict == "check")


@pytest.mark.slow
def test_a_tiny_models_study_and_once_more(models: Models, tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("vllm")
    folder = tmp_path / "study"
    command = ["study", str(models("llama")), "-o", str(folder), "--blocks", "2,1"]
    for option in ("--calibration", "--text", "--perplexity"):
        command += [option, "python-docs"]
    command += ["--sequences", "4", "--sequence-length", "32", "--heal-tokens", "1K", "--rank", "4"]
    command += ["--heal-batch-size", "12"]
    command += ["--minutes", "0.1", "--engine-args", '{"enforce_eager": true, "dtype": "float32"}']
    assert main(command) == 0
    page = (folder / "study.md").read_text()
    told = json.loads((folder / "study.json").read_text())
    assert [(depth["blocks"], depth["model"]) for depth in told["depths"]] == [
        *((0, "dense"), (1, "pruned"), (1, "healed"), (2, "pruned"), (2, "healed")),
    ]
    for depth in told["depths"][1:]:
        assert {"prefill", "decode"} == set(depth["speed"])
        assert depth["verdict"] in ("safe", "check", "harmful")
    repairs = read_manifest(folder / "healed.json").repairs
    # Three steps of 12 sequences of 32 tokens are the first with 1,000 tokens; the second healing
    # begins where the first one ended.
    assert [(repair.blocks, repair.sequences) for repair in repairs] == [(1, 36), (2, 72)]
    html = (folder / "study.html").read_text()
    assert html.count("data:image/png;base64,") == 1
    assert "<script" not in html
    assert "<code>bench/report.html</code>" in html
    assert "`" not in html
    assert page.splitlines()[0] in capsys.readouterr().out
    assert main(command) == 0
    again = capsys.readouterr()
    assert all(f"{step}: done before" in again.err for step in ("select", "heal", "bench"))
    assert (folder / "study.md").read_text() == page
    assert main([*command, "--limit", "3"]) == 2
    assert "holds a study of another model or with other options" in capsys.readouterr().err
