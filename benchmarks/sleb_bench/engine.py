"""One engine in a process of its own, told over a pipe what to measure."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import Any

from sleb_bench.backends import BACKENDS
from sleb_serve.errors import SlebError
from sleb_serve.roofline.workload import Prompts, Workload

_REASON_LENGTH = 400


@dataclass(frozen=True)
class Sample:
    """One measurement. Times in seconds; field names as in the JSON of ``vllm bench``."""

    elapsed_time: float
    num_requests: int
    total_input_tokens: int
    total_output_tokens: int


@dataclass(frozen=True)
class EngineSpec:
    """How to start an engine: which of `BACKENDS`, its arguments, more environment variables."""

    backend: str
    arguments: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Failure:
    """Sent by the child instead of a result."""

    reason: str


class EngineError(SlebError):
    """An engine that did not start, failed or ended."""


class Engine:
    """An engine in a child process.

    Args:
        name: what to call it in messages.
        spec: what to start.
        log: where the child's output goes.
    """

    def __init__(self, name: str, spec: EngineSpec, log: Path) -> None:
        self.name = name
        self._log = log
        self._begin = time.perf_counter()
        context = SpawnContext()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, spec, str(log)))
        self._process.start()
        theirs.close()

    def ready(self) -> dict[str, Any]:
        """Wait for the engine's start; what it says of itself, and the seconds it took.

        Raises:
            EngineError: it ended instead.
        """
        result: dict[str, Any] = self._receive()
        return {"startup_time": time.perf_counter() - self._begin, **result}

    def measure(self, workload: Workload, prompts: Prompts) -> Sample:
        """Put `prompts` through `workload`."""
        return Sample(*self._ask("measure", workload, prompts))

    def loss(self, sequences: Prompts) -> float:
        """Mean nats per predicted token of sequences of token ids."""
        result: float = self._ask("loss", sequences)
        return result

    def profile(self, workload: Workload, prompts: Prompts) -> str:
        """Where one run of `workload` spends its time: a table of operators."""
        result: str = self._ask("profile", workload, prompts)
        return result

    def close(self) -> None:
        """End the engine; harmless if it has ended."""
        self._pipe.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, action: str, *values: Any) -> Any:
        # A child that is gone shows when its answer is read.
        with contextlib.suppress(OSError):
            self._pipe.send((action, *values))
        return self._receive()

    def _receive(self) -> Any:
        try:
            result = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(10)
            raise EngineError(
                f"the {self.name} engine ended without a word; see its log: {self._log}"
            ) from None
        if isinstance(result, _Failure):
            why = " ".join(result.reason.split())
            raise EngineError(
                f"the {self.name} engine failed: {why[:_REASON_LENGTH]}; its output is in "
                f"{self._log}"
            )
        return result


def _serve(pipe: Connection, spec: EngineSpec, log: str) -> None:
    """The child: start the engine, answer requests until the pipe closes."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # One process less to schedule while another engine is measured; several ranks still get
    # processes of their own.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.update(spec.environment)
    try:
        backend = BACKENDS[spec.backend](**spec.arguments)
    except Exception as error:
        pipe.send(_Failure(str(error) or type(error).__name__))
        raise
    pipe.send({**backend.about(), "memory_bytes": _memory()})
    while True:
        try:
            action, *values = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(getattr(backend, action)(*values))
        except ValueError as error:
            pipe.send(_Failure(str(error)))


def _memory() -> int | None:
    """Bytes resident in this process and those it started, shared ones counted once."""
    try:
        import psutil

        process = psutil.Process()
        family = [process, *process.children(recursive=True)]
        return sum(int(member.memory_full_info().pss) for member in family)
    except (ImportError, AttributeError, OSError):
        return None
