"""Runs steps in separate processes with time limits, and saves results immediately."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = "results.jsonl"
LEAST = 15.0
"""Minimum remaining seconds for a step, the time to import vLLM."""
GRACE = 10.0
"""Seconds between SIGTERM and SIGKILL, a tenth of the limit at most, for a step to save what it has
measured."""
_TAIL = 1500


@dataclass(frozen=True)
class Step:
    """One measurement.

    Attributes:
        name: its name on the command line.
        limit: time limit in seconds.
        module: module with a function ``step_NAME`` (dashes as underscores) that takes a `Kit`.
        what: one-line description of the measurement.
        gpu_only: why a CPU cannot run it; empty if it can.
    """

    name: str
    limit: float
    module: str
    what: str
    gpu_only: str = ""


def append(folder: Path, entry: Mapping[str, Any]) -> None:
    """Append one JSON line to the results and sync it to disk."""
    line = json.dumps(entry)
    print(line, flush=True)
    with (folder / RESULTS).open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def run_steps(
    steps: Sequence[Step],
    command: Callable[[Step], Sequence[str]],
    folder: Path,
    budget: float,
    *,
    gpu: bool,
    environment: Mapping[str, str] | None = None,
) -> list[str]:
    """Run the steps in order, while there is time.

    Args:
        steps: the steps, most valuable first.
        command: the child process of a step.
        folder: folder for the results and the steps' logs.
        budget: seconds for all steps; also limits each step.
        gpu: whether there is a GPU; without one, steps that need it are skipped.
        environment: extra variables for the children.

    Returns:
        The outcome of each step: done, failed, stopped or skipped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    outcomes = []
    for step in steps:
        left = budget - (time.monotonic() - begin)
        result: dict[str, Any]
        if step.gpu_only and not gpu:
            result = {"outcome": "skipped", "why": step.gpu_only}
        elif left < min(LEAST, step.limit):
            result = {"outcome": "skipped", "why": f"{max(0.0, left):.0f} s of the budget are left"}
        else:
            result = _run(step, command(step), folder, min(step.limit, left), environment or {})
        append(folder, {"record": "step", "step": step.name, **result})
        outcomes.append(str(result["outcome"]))
    return outcomes


def _run(
    step: Step, command: Sequence[str], folder: Path, limit: float, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Run one step, and end its process group afterwards to free the GPU's memory."""
    log = folder / f"{step.name}.log"
    begin = time.monotonic()
    grace = min(GRACE, limit / 10)
    code: int | None = None
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            code = child.wait(limit - grace)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(grace)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    result: dict[str, Any] = {"seconds": round(time.monotonic() - begin, 1)}
    if code == 0:
        return {"outcome": "done", **result}
    why = f"stopped after {limit:.0f} s" if code is None else f"exit code {code}"
    tail = log.read_text(encoding="utf-8", errors="replace")[-_TAIL:]
    return {"outcome": "stopped" if code is None else "failed", **result, "why": why, "log": tail}
