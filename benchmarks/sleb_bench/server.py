"""A vLLM server as a child process: start, wait until it answers, stop."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from sleb_serve.errors import SlebError
from sleb_serve.serving.client import Client


def free_port() -> int:
    """A TCP port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            return int(reply.status) == 200
    except (urllib.error.URLError, OSError):
        return False


class Server:
    """A server started by `command`, which must listen on `port` of this machine.

    Its output goes to `log`. It runs in a process group of its own, so that nothing of it stays
    behind. `environment` is added to this process's.
    """

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        log: Path,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.command = command
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **environment},
            )

    def answers(self) -> bool:
        """Whether the server is up: a port that is open but not ready does not count."""
        return _healthy(self.url)

    def state(self) -> str:
        """What became of it, in words."""
        code = self.process.poll()
        how = "does not answer" if code is None else f"ended with exit code {code}"
        return f"{how}; its output is in {self.log}"

    def wait(self, timeout: float = 600) -> None:
        """Wait until the server answers.

        Raises:
            SlebError: it ended, or did not answer within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while not self.answers():
            if self.process.poll() is not None:
                raise SlebError(
                    f"the server ended with exit code {self.process.returncode}; see {self.log}"
                )
            if time.monotonic() > deadline:
                raise SlebError(f"the server did not answer in {timeout:.0f} s; see {self.log}")
            time.sleep(0.5)

    def stop(self) -> None:
        """Stop the server and all of its processes; harmless if it has ended."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class RunningServer:
    """A server that somebody else started; it is asked for its model, and left alone.

    Raises:
        SlebError: no address, or no vLLM server there.
    """

    def __init__(self, url: str) -> None:
        client = Client(url)
        self.url, self.model = client.url, client.model()
        self.command = (self.url,)

    def answers(self) -> bool:
        """Whether it is up."""
        return _healthy(self.url)

    def wait(self) -> None:
        """It was up when it was asked for its model."""

    def stop(self) -> None:
        """Not ours to stop."""

    def state(self) -> str:
        """What became of it, in words."""
        return "does not answer"
