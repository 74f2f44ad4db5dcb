"""Servers for tests, started in forks of a process with vLLM imported."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import runpy
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import cast

from commands import select_arguments
from engine_jobs import start_sooner
from forking import end_fork, fork_engines, start_fork
from sleb_bench.server import Server
from sleb_serve.cli.main import main
from sleb_serve.serving.client import Client
from sleb_serve.serving.command import plugin_environment

OPTIONS = ["--enforce-eager", "--max-model-len", "256", "--dtype", "float32"]
LOCAL = ["--host", "127.0.0.1", "--port"]
WITHIN = 30.0
"""Seconds in which a server that lost a process must end."""


def selected(model: Path, folder: Path) -> Path:
    """A manifest of three blocks, found by `select`."""
    output = folder / "m.json"
    assert main(select_arguments(model, output, "--remove", "3")) == 0
    return output


def printed_command(model: Path, manifest: Path, *options: str) -> list[str]:
    """Return the last line of --dry-run, split like in a shell."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["serve", str(model), "-m", str(manifest), *options, "--dry-run"]) == 0
    return shlex.split(printed.getvalue().splitlines()[-1])


def run_until_end(
    command: Sequence[str], port: int, log: Path, **environment: str
) -> tuple[int, str]:
    """Run a server that must not start; return its exit code and output, and check its port.

    It runs in a fork of a process that has vLLM imported, as the command's own main program.
    """
    answered = False
    deadline = time.monotonic() + 300
    child = start_fork(become, log, list(command), **environment)
    try:
        while child.is_alive() and time.monotonic() < deadline:
            with socket.socket() as probe:
                answered |= probe.connect_ex(("127.0.0.1", port)) == 0
            time.sleep(0.05)
    finally:
        end_fork(child)
    assert not answered
    assert child.exitcode is not None
    return child.exitcode, log.read_text()


def become(command: list[str]) -> None:
    """In the fork: be the program that the command would start, to its exit code."""
    become_one_after_another([command])


def become_one_after_another(commands: list[list[str]]) -> None:
    """In the fork: be several programs; one that fails is the last."""
    start_sooner()
    fork_engines()
    try:
        for command in commands:
            _run_program(command)
    finally:
        # Processes of multiprocessing end without them, and the endpoint sets its exit code there.
        atexit._run_exitfuncs()


def _run_program(command: list[str]) -> None:
    try:
        if command[1] == "-m":
            sys.argv = command[2:]
            runpy.run_module(command[2], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise


class ForkedServer(Server):
    """A server in a fork, which need not import vLLM; its engine and workers are forks of that.

    Tests of how a server starts want a real process.
    """

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        log: Path,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.command, self.log = command, log
        self.url = f"http://127.0.0.1:{port}"
        self.process = cast("subprocess.Popen[bytes]", _Forked(command, log, environment))


class _Forked:
    """As much of a `Popen` as a `Server` asks for."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        own = {**plugin_environment(), **environment}
        self._child = start_fork(become, log, list(command), **own)
        assert self._child.pid is not None
        self.pid = self._child.pid

    @property
    def returncode(self) -> int | None:
        return self._child.exitcode

    def poll(self) -> int | None:
        return None if self._child.is_alive() else self._child.exitcode

    def terminate(self) -> None:
        self._child.terminate()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int | None:
        self._child.join(timeout)
        if self._child.is_alive():
            raise subprocess.TimeoutExpired(list(map(str, [self.pid])), timeout or 0)
        return self._child.exitcode


class Streaming(threading.Thread):
    """A client that streams one answer after another until something goes wrong."""

    def __init__(self, url: str, model: str) -> None:
        super().__init__(daemon=True)
        self.url, self.model = url, model
        self.tokens = 0
        self.error: Exception | None = None

    def run(self) -> None:
        import openai

        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)
        while self.error is None:
            try:
                stream = client.completions.create(
                    model=self.model,
                    prompt=[5, 6, 7],
                    max_tokens=200,
                    stream=True,
                    temperature=0,
                    extra_body={"ignore_eos": True},
                )
                finished = None
                for chunk in stream:
                    self.tokens += 1
                    finished = chunk.choices[0].finish_reason or finished
                if finished is None:
                    raise ConnectionError("the stream ended without a reason")
            except Exception as error:
                self.error = error


def streams_of(server: Server, count: int, within: float = 120) -> list[Streaming]:
    """Clients that stream, once each has some tokens, which may take so many seconds."""
    clients = [Streaming(server.url, Client(server.url).model()) for _ in range(count)]
    for client in clients:
        client.start()
    deadline = time.monotonic() + within
    while min(client.tokens for client in clients) < 20:
        assert time.monotonic() < deadline
        assert all(client.error is None for client in clients)
        time.sleep(0.05)
    return clients
