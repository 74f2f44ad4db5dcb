"""The Python API: typed values, no file unless asked, errors without command-line flags."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

import oracle
from commands import Capture, select_arguments
from conftest import ROOT
from running import ForkedServer
from sleb_bench.server import free_port
from sleb_serve import (
    EvalConfig,
    SelectConfig,
    SlebError,
    evaluate,
    export,
    read_manifest,
    select,
    serve_command,
)
from sleb_serve.cli.main import as_options, main, parsers

Models = Callable[[str], Path]

CONFIG = SelectConfig(remove=2, calibration="python-docs", sequences=2, sequence_length=32)
"""The same options as `select_arguments` on the command line."""


def test_the_api_selects_what_the_command_line_does_and_writes_nothing(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = models("llama")
    assert main(select_arguments(path, tmp_path / "m.json")) == 0
    written = {file.name for file in tmp_path.iterdir()}
    found = select(path, CONFIG)
    assert {file.name for file in tmp_path.iterdir()} == written
    assert found.to_json() == (tmp_path / "m.json").read_bytes()
    report = evaluate(
        path, found, EvalConfig(blocks=(0, 2), perplexity=("python-docs",), sequences=2)
    )
    assert {file.name for file in tmp_path.iterdir()} == written
    dense, pruned = (entry["perplexity"]["python-docs"] for entry in report["results"])
    assert dense != pruned
    done = export(path, found, tmp_path / "out")
    assert done.blocks == 6
    theirs, ours = oracle.load(tmp_path / "out"), oracle.pruned(path, found.blocks)
    assert oracle.prompt_logprobs(theirs, [1, 2, 3]) == oracle.prompt_logprobs(ours, [1, 2, 3])
    command = serve_command(path, found, ["--port", "8001"])
    assert "--hf-overrides" in command
    assert "8001" in command


def test_with_an_output_the_manifest_lies_there(models: Models, tmp_path: Path) -> None:
    config = SelectConfig(**{**vars(CONFIG), "repair": "fold", "sequences": 4})
    manifest = select(models("llama"), config, tmp_path / "m.json")
    assert read_manifest(tmp_path / "m.json").to_json() == manifest.to_json()
    assert manifest.repair is not None
    assert (tmp_path / manifest.repair.file).is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"remove": 0}, "remove=0: give a whole number"),
        ({"remove": 1.5}, "remove=1.5: give a whole number"),
        ({"remove": float("nan")}, "remove=nan: give a whole number"),
        ({"remove": 99}, "remove=99: of 8 blocks at most 6"),
        ({"search": "beam"}, "search=beam: choose one of greedy, fast"),
        ({"dtype": "int8"}, "dtype=int8: choose one of auto"),
        ({"objective": "best"}, "objective=best: choose one of nll, kl, embedding"),
        ({"repair": "fold"}, "give `output`"),
        ({"sequences": 0}, "sequences=0"),
        ({"sequence_length": 1 << 20}, "sequence_length"),
        ({"seeds": 0}, "seeds=0"),
        ({"rows": 3}, "`rows` is for"),
    ],
)
def test_errors_name_parameters_and_the_command_line_names_options(
    models: Models, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(SlebError) as caught:
        select(models("llama"), SelectConfig(**{**vars(CONFIG), **changes}))
    text = str(caught.value)
    assert message in text
    assert re.search(r"(?<!\w)--[a-z]", text) is None
    parser, _ = parsers()
    shown = as_options(text, parser)
    for name in changes:
        assert f"{name}=" not in shown
        assert f"`{name}`" not in shown


def test_other_text_is_left_as_it_is() -> None:
    parser, _ = parsers()
    for text in ("use `sleb-serve select`", "a=b", "config['remove']={}", "x--remove=3"):
        assert as_options(text, parser) == text


def test_importing_it_loads_neither_torch_nor_vllm() -> None:
    script = """
import sys
import sleb_serve
from sleb_serve import *
heavy = {"torch", "vllm", "transformers", "numpy"} & sys.modules.keys()
assert not heavy, heavy
assert set(sleb_serve.__all__) <= set(dir(sleb_serve))
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


@pytest.mark.slow
def test_the_script_of_the_documentation_runs(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    port = free_port()
    script = ROOT / "docs" / "python_api.py"
    assert len(script.read_text().splitlines()) < 25
    options = ["--port", str(port), "--enforce-eager", "--dtype", "float32"]
    started: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", [str(script), str(models("llama")), *options])
    # What it starts is started as a fork below, where vLLM is imported.
    monkeypatch.setattr(subprocess, "run", lambda command, check: started.append(command))
    runpy.run_path(str(script), run_name="__main__")
    assert "blocks=6" in capsys.readouterr().out
    server = ForkedServer(started[0], port, tmp_path / "log")
    try:
        server.wait()
        with urllib.request.urlopen(f"{server.url}/v1/models") as reply:
            (served,) = json.load(reply)["data"]
    finally:
        server.stop()
    assert "sleb" in served["id"]
    config = json.loads((tmp_path / "pruned-model" / "config.json").read_text())
    assert config["num_hidden_layers"] == 6
