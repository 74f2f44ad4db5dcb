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
    """Return a currently free TCP port."""
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
    """A server started by `command`, which must listen on the local `port`.

    Its output goes to `log`. It runs in its own process group, so that no child is left behind.
    `environment` is added to this process's.
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
        """Return whether the server is ready; an open port is not enough."""
        return _healthy(self.url)

    def state(self) -> str:
        """Describe its state."""
        code = self.process.poll()
        how = "does not answer" if code is None else f"ended with exit code {code}"
        return f"{how}; its output is in {self.log}"

    def wait(self, timeout: float = 600) -> None:
        """Wait until the server answers.

        Raises:
            SlebError: it ended or did not answer within `timeout` seconds.
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
        """Stop the server and all its processes; does nothing if it has ended."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class RunningServer:
    """An external server; only its model is queried.

    Raises:
        SlebError: the address is invalid, or there is no vLLM server.
    """

    def __init__(self, url: str) -> None:
        client = Client(url)
        self.url, self.model = client.url, client.model()
        self.command = (self.url,)

    def answers(self) -> bool:
        """Return whether it is up."""
        return _healthy(self.url)

    def wait(self) -> None:
        """Do nothing: it was up when its model was queried."""

    def stop(self) -> None:
        """Do nothing: an external server is not stopped."""

    def state(self) -> str:
        """Describe its state."""
        return "does not answer"
