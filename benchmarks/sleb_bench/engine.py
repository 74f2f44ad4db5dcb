"""Engines in separate processes, controlled over a pipe."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any

from sleb_bench.backends import BACKENDS, Backend
from sleb_bench.conditions import Watch
from sleb_serve.errors import SlebError
from sleb_serve.roofline.workload import Prompts, Workload

_REASON_LENGTH = 400
_DEVICES = ("nvidia[0-9]*", "kfd", "accel*")
_IMPORTED = ("vllm.entrypoints.llm", "vllm.v1.worker.cpu_model_runner")


@dataclass(frozen=True)
class Sample:
    """One turn. Times are in seconds; field names are as in the JSON of ``vllm bench``.

    Attributes:
        elapsed_time: time of all calls, as defined by the workload.
        cpu_time: CPU-seconds of the engine and its children, for whole calls.
        num_requests: of all calls.
        total_input_tokens: of all calls.
        total_output_tokens: of all calls.
        conditions: see `Conditions`.
    """

    elapsed_time: float
    cpu_time: float
    num_requests: int
    total_input_tokens: int
    total_output_tokens: int
    conditions: Mapping[str, Any]


@dataclass(frozen=True)
class EngineSpec:
    """How to start an engine: one of `BACKENDS`, its arguments, extra environment variables."""

    backend: str
    arguments: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Failure:
    """Sent by the child instead of a result."""

    reason: str


class EngineError(SlebError):
    """An engine did not start, failed or ended."""


def has_gpu() -> bool:
    """Return whether a driver shows a device: NVIDIA, AMD or another accelerator."""
    return any(found for name in _DEVICES for found in Path("/dev").glob(name))


def process_context() -> ForkServerContext | SpawnContext:
    """Return how to start engine processes.

    On a CPU they are forks of a process that has imported but never run vLLM, because importing
    takes longer than starting a small engine. A process that used a GPU must not fork, and
    importing might use it.
    """
    if has_gpu():
        return SpawnContext()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    return context


class Host:
    """A child process with engines that work one at a time.

    Args:
        environment: variables to set in it.
        log: file for its output.
    """

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        context = process_context()
        self._pipe, theirs = context.Pipe()
        # A fork inherits the environment of its parent.
        values = (theirs, {**os.environ, **environment}, str(log))
        self._process = context.Process(target=_serve, args=values)
        self._process.start()
        theirs.close()

    def start(self, name: str, spec: EngineSpec) -> dict[str, Any]:
        """Start an engine; return its description and the seconds it took.

        Raises:
            EngineError: it did not start.
        """
        begin = time.perf_counter()
        result: dict[str, Any] = self.ask(name, "start", spec)
        return {"startup_time": time.perf_counter() - begin, **result}

    def close(self) -> None:
        """End the process and its engines; does nothing if it has ended."""
        self._pipe.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def ask(self, name: str, action: str, *values: Any) -> Any:
        """Return an engine's answer.

        Raises:
            EngineError: the engine failed, or the process ended.
        """
        # A dead child is noticed when reading its answer.
        with contextlib.suppress(OSError):
            self._pipe.send((name, action, *values))
        try:
            result = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(10)
            raise EngineError(f"the {name} engine process died; see its log: {self._log}") from None
        if isinstance(result, _Failure):
            why = " ".join(result.reason.split())
            raise EngineError(
                f"the {name} engine failed: {why[:_REASON_LENGTH]}; its output is in {self._log}"
            )
        return result


@dataclass(frozen=True)
class Engine:
    """An engine started by a `Host`. Every method may raise `EngineError`."""

    host: Host
    name: str

    def measure(self, workload: Workload, calls: Sequence[Prompts]) -> Sample:
        """Run one turn: the prompts of each call with `workload`."""
        found: Sample = self.host.ask(self.name, "measure", workload, calls)
        return found

    def loss(self, sequences: Prompts) -> float:
        """Return the mean nats per predicted token of sequences of token ids."""
        result: float = self.host.ask(self.name, "loss", sequences)
        return result

    def profile(self, workload: Workload, prompts: Prompts) -> str:
        """Profile one run of `workload`: a table of operators."""
        result: str = self.host.ask(self.name, "profile", workload, prompts)
        return result


def measure(backend: Backend, workload: Workload, calls: Sequence[Prompts]) -> Sample:
    """Run one turn of a backend in this process.

    Raises:
        ValueError: the result is not as requested.
    """
    watch = Watch()
    found = [backend.measure(workload, prompts) for prompts in calls]
    cpu, conditions = watch.read()
    seconds, requests, inputs, outputs = (sum(values) for values in zip(*found, strict=True))
    return Sample(seconds, cpu, int(requests), int(inputs), int(outputs), asdict(conditions))


def _serve(pipe: Connection, environment: Mapping[str, str], log: str) -> None:
    """Run the child: start engines and answer requests until the pipe closes."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # One process less to schedule while another engine is measured; several ranks still get their
    # own processes.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.update(environment)
    engines: dict[str, Backend] = {}
    while True:
        try:
            name, action, *values = pipe.recv()
        except EOFError:
            return
        try:
            if action == "start":
                (spec,) = values
                engines[name] = BACKENDS[spec.backend](**spec.arguments)
                memory = _memory() if len(engines) == 1 else None
                pipe.send({**engines[name].about(), "memory_bytes": memory})
            elif action == "measure":
                pipe.send(measure(engines[name], *values))
            else:
                pipe.send(getattr(engines[name], action)(*values))
        except Exception as error:
            pipe.send(_Failure(str(error) or type(error).__name__))
            if action == "start" or not isinstance(error, ValueError):
                raise


def _memory() -> int | None:
    """Return the resident bytes of this process and its children, counting shared ones once."""
    try:
        import psutil

        process = psutil.Process()
        family = [process, *process.children(recursive=True)]
        return sum(int(member.memory_full_info().pss) for member in family)
    except (ImportError, AttributeError, OSError):
        return None
