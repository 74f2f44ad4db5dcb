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


def free_port() -> int:
    """A TCP port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


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
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as reply:
                return int(reply.status) == 200
        except (urllib.error.URLError, OSError):
            return False

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
