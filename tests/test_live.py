"""Asking running servers: probe and canary against one that is simulated, and select's metrics."""

from __future__ import annotations

import json
import math
import re
import threading
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import oracle
from sleb_serve import cli
from sleb_serve.binding import bind
from sleb_serve.checkpoint import open_checkpoint
from sleb_serve.cli import main
from sleb_serve.manifest import Golden, Manifest, Removal, read_manifest
from sleb_serve.search_metrics import SearchMetrics

Models = Callable[[str], Path]

GOLDEN = Golden((5, 7, 9), (-1.5, -2.5))


class Fake(ThreadingHTTPServer):
    """A server that answers as vLLM would, with log-probabilities of our choice."""

    def __init__(self, manifest: Any, logprobs: tuple[float, ...], text: str = "an answer") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.manifest, self.logprobs, self.text = manifest, logprobs, text
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Fake

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.answer({"data": [{"id": "m"}]})
        elif self.path == "/sleb/manifest" and self.server.manifest is not None:
            self.answer(self.server.manifest)
        else:
            self.answer({"error": "none"}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["model"] == "m"
        assert body["temperature"] == 0
        places = [None, *({"3": {"logprob": value}} for value in self.server.logprobs)]
        text = self.server.text
        choice = {"text": text, "prompt_logprobs": places}
        self.answer({"choices": [choice], "usage": {"completion_tokens": len(text.split())}})

    def answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[..., Fake]]:
    servers: list[Fake] = []

    def start(*arguments: Any) -> Fake:
        servers.append(Fake(*arguments))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def manifest(models: Models, tmp_path: Path) -> Path:
    path = str(models("llama"))
    binding = bind(path, open_checkpoint(path))
    removed = (Removal(3), Removal(1))
    Manifest(binding, removed, golden=GOLDEN).write(tmp_path / "m.json")
    return tmp_path / "m.json"


def told(manifest: Path, blocks: int | None = None) -> dict[str, Any]:
    digest = read_manifest(manifest).prefix(blocks).pruning().digest
    return {"digest": digest, "ranks": [{"digest": digest}, {"digest": digest}]}


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
        ({}, (-1.5, math.nan), "nan nats off"),
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
    ("options", "message"),
    [
        (["--requests", "0"], "--requests must be at least 1"),
        (["--prompts", "none.txt"], "cannot read prompts none.txt"),
    ],
)
def test_a_canary_without_prompts_is_refused(
    serve: Callable[..., Fake],
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    server = serve(None, (-1.0,))
    assert main(["canary", "--dense", server.url, "--pruned", server.url, *options]) == 2
    assert message in capsys.readouterr().err


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

    monkeypatch.setattr(cli, "SearchMetrics", Watched)
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
