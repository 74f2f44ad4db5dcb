"""Fast child processes: forks of a process with slow imports done."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

PRELOADED = [
    "sleb_serve.cli.main",
    "transformers",
    "compressed_tensors",
    "vllm.entrypoints.llm",
    "vllm.entrypoints.openai.api_server",
    "vllm.model_executor.models.llama",
    "vllm.v1.engine.coordinator",
    "vllm.v1.worker.cpu.model_runner",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.worker.cpu_worker",
]
"""Modules imported before forking, if installed."""


def forks() -> ForkServerContext:
    """Start processes with vLLM imported: forks of a process that never ran an engine.

    Importing it costs a quarter of a minute or more. What libraries read of the environment while
    they are imported is as it was when the first of these processes was started; all but the hub's.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def start_fork(
    work: Callable[..., None], log: Path, *arguments: Any, **environment: str
) -> ForkServerProcess:
    """Do work of a module's top level in a fork, in a session of its own; its output goes to log.

    Its environment is this process's and what is added, for what is read while it works.
    """
    whole = {**os.environ, **environment}
    child = forks().Process(target=_do, args=(work, log, arguments, whole))
    child.start()
    return child


def run_fork(work: Callable[..., None], log: Path, *arguments: Any, **environment: str) -> int:
    """Run `start_fork` to its end, and return the exit code."""
    child = start_fork(work, log, *arguments, **environment)
    try:
        child.join()
    finally:
        end_fork(child)
    assert child.exitcode is not None
    return child.exitcode


def end_fork(child: ForkServerProcess) -> None:
    """Kill a fork and its child processes."""
    assert child.pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.join()


def fork_engines() -> None:
    """From now on in this process, vLLM's engines and workers are forks of it, as they are on GPUs.

    On a CPU it starts new processes, and each imports vLLM. Nothing may have been computed here:
    OpenMP's threads do not live on in a fork.
    """
    from vllm.v1.engine import coordinator, utils
    from vllm.v1.executor import multiproc_executor

    for module in (coordinator, utils, multiproc_executor):
        module.get_mp_context = partial(multiprocessing.get_context, "fork")


def _do(
    work: Callable[..., None], log: Path, arguments: tuple[Any, ...], environment: dict[str, str]
) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    hub_changes = any(
        name.startswith("HF_") and os.environ.get(name) != value
        for name, value in environment.items()
    )
    os.environ.update(environment)
    if hub_changes:
        _ask_this_hub()
    work(*arguments)


def _ask_this_hub() -> None:
    """Let the hub's library, and who copied from it, read its part of the environment again."""
    from huggingface_hub import constants, hf_api

    before = dict(vars(constants))
    importlib.reload(constants)
    changed = {
        name: value
        for name, value in vars(constants).items()
        if isinstance(value, str | bool) and before.get(name, value) != value
    }
    for module in list(sys.modules.values()):
        for name, value in changed.items():
            if vars(module).get(name) == before[name]:
                setattr(module, name, value)
    hf_api.api.endpoint = constants.ENDPOINT
