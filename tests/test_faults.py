"""Production failures: workers, disks, folders."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from commands import run_on_full_disk
from conftest import Models
from forking import run_fork
from running import LOCAL, OPTIONS, WITHIN, ForkedServer, printed_command, streams_of
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.cli import main as cli
from sleb_serve.cli.progress import SearchBars
from sleb_serve.manifest.binding import bind
from sleb_serve.manifest.schema import Manifest, Removal
from sleb_serve.selection.search import Step
from sleb_serve.serving.command import plugin_environment

TEXT = ["--calibration", "python-docs", "--sequences", "2", "--sequence-length", "32"]


def select(model: Path, output: Path) -> list[str]:
    return ["select", str(model), "-o", str(output), "--remove", "2", *TEXT]


def one_line(text: str) -> str:
    """The error message, which must be the last line and the only one of its kind."""
    lines = [line for line in text.splitlines() if "error: " in line.lower()]
    assert len(lines) == 1, text
    assert "Traceback" not in text
    return lines[0]


@pytest.mark.parametrize("limit", [0, 600])
def test_a_full_disk_leaves_no_half_written_manifest(
    models: Models, tmp_path: Path, limit: int
) -> None:
    """A limit on file size stands for a disk that fills: writing ends with an error from there."""
    output = tmp_path / "m.json"
    log = tmp_path / "log"
    code = run_fork(run_on_full_disk, log, select(models("llama"), output), limit)
    error = log.read_text()
    assert code == 2, error
    message = one_line(error)
    assert message.startswith("sleb-serve: error: ")
    assert "File too large" in message or "No usable temporary directory" in message
    assert not output.exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"log", "m.json.search.jsonl"}


def test_a_folder_that_vanishes_in_mid_search_is_an_error_of_one_line(
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()

    class Vanishing(SearchBars):
        def step_ended(self, number: int, step: Step) -> None:
            super().step_ended(number, step)
            shutil.rmtree(folder, ignore_errors=True)

    monkeypatch.setattr("sleb_serve.cli.select.SearchBars", Vanishing)
    assert cli.main(select(models("llama"), folder / "m.json")) == 2
    assert str(folder) in one_line(capsys.readouterr().err)
    assert not folder.exists()


def test_nothing_is_written_beside_the_model(models: Models, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(models("llama"), model)
    before = {path: path.stat().st_mtime_ns for path in model.iterdir()}
    for path in (*model.iterdir(), model):
        path.chmod(0o555 if path.is_dir() else 0o444)
    output = tmp_path / "m.json"
    assert cli.main(select(model, output)) == 0
    for arguments in (
        ["check", str(model), "-m", str(output)],
        ["export", str(model), "-m", str(output), "-o", str(tmp_path / "exported")],
        ["serve", str(model), "-m", str(output), "--dry-run"],
    ):
        assert cli.main(arguments) == 0
    model.chmod(0o755)
    assert {path: path.stat().st_mtime_ns for path in model.iterdir()} == before


@pytest.mark.slow
def test_a_server_that_loses_a_rank_or_is_stopped_ends_and_starts_again(
    models: Models, tmp_path: Path
) -> None:
    """Two clients stream from two ranks: once a worker is killed, once the server told to end.

    All processes are forks, as on a GPU, so that a signal to one must not reach another.
    """
    pytest.importorskip("vllm")
    pytest.importorskip("psutil")
    pytest.importorskip("openai")
    from sleb_bench.server import free_port

    path = models("llama")
    manifest = Manifest(bind(str(path), open_checkpoint(str(path))), (Removal(3), Removal(1)))
    manifest.write(tmp_path / "m.json")
    port = free_port()
    command = printed_command(
        path, tmp_path / "m.json", *OPTIONS, "--tensor-parallel-size", "2", *LOCAL, str(port)
    )
    environment = plugin_environment()
    if (os.cpu_count() or 1) > 1:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    for kill in (True, False):
        server = ForkedServer(command, port, tmp_path / "log", environment)
        try:
            server.wait(300)
            check_end_under_load(server, manifest, kill)
        finally:
            server.stop()


def check_end_under_load(server: Any, manifest: Manifest, kill: bool) -> None:
    """Kill a worker, or ask the server to end: all processes are gone soon, and clients told."""
    import psutil

    from sleb_serve.serving.client import Client
    from sleb_serve.serving.probe import probe

    assert probe(Client(server.url), manifest).ranks == 2
    clients = streams_of(server, 2)
    family = psutil.Process(server.process.pid).children(recursive=True)
    begin = time.monotonic()
    if kill:
        own = [p for p in family if "resource_tracker" not in " ".join(p.cmdline())]
        # The server's child is the engine, and the workers are the engine's.
        next(p for p in own if p.ppid() != server.process.pid).send_signal(signal.SIGKILL)
    else:
        server.process.send_signal(signal.SIGTERM)
    code = server.process.wait(WITHIN)
    assert time.monotonic() - begin < WITHIN
    assert (code != 0) == kill
    for client in clients:
        client.join(WITHIN)
        assert client.error is not None
    _, alive = psutil.wait_procs(family, timeout=WITHIN)
    assert not alive


@pytest.mark.slow
def test_vllm_by_itself_ends_with_0_when_its_engine_has_died(
    models: Models, tmp_path: Path
) -> None:
    """Once this fails, the plugin's endpoint need not see to the exit code any more."""
    pytest.importorskip("vllm")
    import psutil

    from sleb_bench.server import free_port

    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(models("llama")), "--enforce-eager", "--max-model-len", "256"]
    command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    server = ForkedServer(command, port, tmp_path / "log", {"VLLM_PLUGINS": "none"})
    try:
        server.wait(300)
        family = psutil.Process(server.process.pid).children(recursive=True)
        for child in family:
            if child.ppid() == server.process.pid:
                child.kill()
        assert server.process.wait(WITHIN) == 0
    finally:
        server.stop()
