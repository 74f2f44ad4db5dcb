"""probe and canary against simulated servers, and select's metrics."""

from __future__ import annotations

import json
import math
import re
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import oracle
from conftest import Models
from fake_servers import GOLDEN, Fake, told
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.cli.main import main
from sleb_serve.manifest.binding import bind
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.manifest.schema import Manifest, Removal
from sleb_serve.selection.metrics import SearchMetrics
from sleb_serve.serving.canary import read_prompts


@pytest.fixture
def manifest(models: Models, tmp_path: Path) -> Path:
    path = str(models("llama"))
    binding = bind(path, open_checkpoint(path))
    removed = (Removal(3), Removal(1))
    Manifest(binding, removed, golden=GOLDEN).write(tmp_path / "m.json")
    return tmp_path / "m.json"


def test_a_server_that_computes_the_golden_prompt_is_ready(
    manifest: Path, serve: Callable[..., Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(told(manifest), (-1.5, -2.54))
    assert main(["probe", server.url, "-m", str(manifest)]) == 0
    printed = capsys.readouterr().out
    assert "on 2 rank(s)" in printed
    assert "within 0.0200 nats" in printed


def test_a_prefix_has_no_golden_prompt_but_a_digest(
    manifest: Path, serve: Callable[..., Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(told(manifest, 1), ())
    assert main(["probe", server.url, "-m", str(manifest), "--blocks", "1"]) == 0
    assert "no golden log-probabilities" in capsys.readouterr().out
    assert main(["probe", server.url, "-m", str(manifest)]) == 1


@pytest.mark.parametrize(
    ("change", "logprobs", "message"),
    [
        ({"digest": "f" * 64}, (-1.5, -2.5), "serves manifest ffffffff, not"),
        ({"ranks": [{"digest": "f" * 64}]}, (-1.5, -2.5), "not every rank serves"),
        ({"ranks": []}, (-1.5, -2.5), "not every rank serves"),
        ({}, (-1.5, -3.5), "0.5000 nats off on average"),
        ({}, (-1.5, math.nan), "NaN is not a JSON number"),
        ({}, (-1.5, -1e300), "is out of range: -1e+300"),
        ({}, (-1.5,), "gave 1 log-probabilities for the golden prompt, not 2"),
    ],
)
def test_a_server_that_serves_something_else_is_not_ready(
    manifest: Path,
    serve: Callable[..., Fake],
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    logprobs: tuple[float, ...],
    message: str,
) -> None:
    server = serve({**told(manifest), **change}, logprobs)
    assert main(["probe", server.url, "-m", str(manifest)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_dense_server_and_none_at_all_are_not_ready(
    manifest: Path, serve: Callable[..., Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(None, ())
    assert main(["probe", server.url, "-m", str(manifest)]) == 1
    assert "a dense model, or a server whose VLLM_PLUGINS" in capsys.readouterr().err
    assert main(["probe", "http://127.0.0.1:9", "-m", str(manifest)]) == 1
    assert "is the server up?" in capsys.readouterr().err
    assert main(["probe", "localhost:8000", "-m", str(manifest)]) == 2
    assert "give the server's address" in capsys.readouterr().err


def test_the_canary_measures_drift(
    serve: Callable[..., Fake], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = serve(None, (-1.0, -2.0), "one two three four")
    pruned = serve(None, (-1.5, -1.8), "one two 3")
    (tmp_path / "p.txt").write_text("a prompt\n\nanother\n")
    arguments = ["canary", "--dense", dense.url, "--pruned", pruned.url]
    prompts = ["--prompts", str(tmp_path / "p.txt"), "--json"]
    assert main([*arguments, *prompts]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == pytest.approx(
        {
            "requests": 2,
            "dense_loss": 1.5,
            "pruned_loss": 1.65,
            "loss_drift": 0.15,
            "logprob_drift": 0.35,
            "same_share": 8 / 18,
            "dense_tokens": 4,
            "pruned_tokens": 3,
        }
    )
    assert main([*arguments, "--requests", "3", "--max-drift", "0.2"]) == 0
    assert "drift +0.1500" in capsys.readouterr().out
    assert main([*arguments, "--requests", "3", "--max-drift", "0.1"]) == 1
    assert "more than 0.1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "content", "message"),
    [
        (["--requests", "0"], None, "--requests must be at least 1"),
        (["--prompts", "none.txt"], None, "cannot read prompts none.txt"),
        (["--prompts", "p.txt"], b" \n\n", "p.txt: no prompts in it"),
        (["--prompts", "p.txt"], b"\xff", "cannot read prompts p.txt"),
        (["--prompts", "p.jsonl"], b'{"prompt": "a"}\n{', "p.jsonl, line 2: not JSON"),
        (["--prompts", "p.jsonl"], b'\n{"prompt": {"a": 1}}', "p.jsonl, line 2 has no text"),
        (["--prompts", "p.jsonl"], b'["a"]', "p.jsonl, line 1: it must be an object"),
    ],
)
def test_a_canary_without_prompts_is_refused(
    serve: Callable[..., Fake],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    content: bytes | None,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(options[-1]).write_bytes(content)
    server = serve(None, (-1.0,))
    assert main(["canary", "--dense", server.url, "--pruned", server.url, *options]) == 2
    assert message in capsys.readouterr().err


def test_prompts_are_read_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\u2028b"}\n\n{"text": "c"}\n{"text": "d"}\n')
    assert read_prompts(tmp_path / "p.jsonl", 2) == ["a\u2028b", "c"]
    prompts = read_prompts(None, 100_000)
    assert len(prompts) > 1000
    assert all(prompts)


def test_a_selection_stores_what_the_pruned_model_makes_of_a_prompt_and_shows_its_progress(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, float] = {}

    class Watched(SearchMetrics):
        """Scrapes itself when the last step is done."""

        def step_ended(self, number: int, step: Any) -> None:
            super().step_ended(number, step)
            url = f"http://127.0.0.1:{self.port}/metrics"
            text = urllib.request.urlopen(url, timeout=10).read().decode()
            for name, value in re.findall(r"^sleb_select_(\w+) (\S+)$", text, re.MULTILINE):
                seen[name] = float(value)

    monkeypatch.setattr("sleb_serve.cli.select.SearchMetrics", Watched)
    path, output = models("llama"), tmp_path / "m.json"
    text = ["--calibration", "python-docs", "--sequences", "2", "--sequence-length", "32"]
    arguments = ["select", str(path), "-o", str(output), "--remove", "2", *text]
    assert main([*arguments, "--metrics-port", "0"]) == 0

    found = read_manifest(output)
    assert seen["steps_total"] == 2
    assert seen["last_block"] == found.removed[-1].block
    assert seen["loss"] == pytest.approx(found.removed[-1].loss)
    assert seen["candidates"] == 5  # of 8 blocks one is gone, and two are barriers
    assert seen["layer_tokens_total"] == 32 * seen["layer_runs_total"] > 0

    assert found.golden is not None
    assert len(found.golden.tokens) == 32
    model = oracle.pruned(path, found.blocks)
    expected = oracle.prompt_logprobs(model, list(found.golden.tokens))
    assert found.golden.logprobs == pytest.approx(expected, abs=2e-4)
    assert found.prefix(2).golden == found.golden
    assert found.prefix(1).golden is None


def test_a_port_that_is_taken_is_refused(
    models: Models, tmp_path: Path, serve: Callable[..., Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(None, ())
    arguments = ["select", str(models("llama")), "-o", str(tmp_path / "m.json"), "--remove", "2"]
    assert main([*arguments, "--metrics-port", str(server.server_port)]) == 2
    assert f"--metrics-port {server.server_port}: " in capsys.readouterr().err
