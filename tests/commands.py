"""The command line in this process, and common arguments."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import ROOT
from forking import end_fork, start_fork
from several_commands import run_commands
from sleb_bench.server import free_port
from sleb_serve.cli.main import main

Capture = pytest.CaptureFixture[str]


def select_arguments(model: Path, output: Path, *options: str) -> list[str]:
    defaults = ["--remove", "2", "--calibration", "python-docs", "--sequences", "2"]
    return ["select", str(model), "-o", str(output), *defaults, "--sequence-length", "32", *options]


def refused(arguments: Sequence[str], capture: Capture) -> str:
    """Run the command line in this process, expect a refusal, and return its line."""
    assert main(arguments) == 2
    captured = capture.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("sleb-serve")]
    assert captured.out == ""
    assert len(lines) == 1
    assert captured.err.rstrip().endswith(lines[0])
    assert "Traceback" not in captured.err
    return lines[0]


def command_line(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "sleb_serve.cli", *arguments]


@dataclass(frozen=True)
class Done:
    """Result of a command."""

    code: int
    out: str
    error: str


def run_in_one(
    commands: Sequence[Sequence[str]],
    folder: Path,
    **environment: str,
) -> list[Done]:
    """Run commands in a separate process, a fork with the needed imports."""
    (results,) = _in_forks(commands, folder, 1, environment)
    return results


def run_in_two(
    commands: Sequence[Sequence[str]],
    folder: Path,
    launcher: Sequence[str] = (),
    **environment: str,
) -> list[list[Done]]:
    """Run commands in two ranks: forks, or what a launcher starts. Results by rank."""
    if not launcher:
        return _in_forks(commands, folder, 2, environment)
    _write(commands, folder)
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "tests" / "several_commands.py"), str(folder)],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [_results(folder, rank) for rank in range(2)]


def _in_forks(
    commands: Sequence[Sequence[str]], folder: Path, ranks: int, environment: Mapping[str, str]
) -> list[list[Done]]:
    _write(commands, folder)
    logs = [folder / f"log-{rank}" for rank in range(ranks)]
    several = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    several["WORLD_SIZE"] = str(ranks)
    children = []
    try:
        for rank, log in enumerate(logs):
            place = {**several, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            children.append(start_fork(run_commands, log, folder, **environment, **place))
        for child, log in zip(children, logs, strict=True):
            child.join()
            assert child.exitcode == 0, log.read_text()[-3000:]
    finally:
        for child in children:
            end_fork(child)
    return [_results(folder, rank) for rank in range(ranks)]


def _write(commands: Sequence[Sequence[str]], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "commands.json").write_text(json.dumps([list(command) for command in commands]))


def _results(folder: Path, rank: int) -> list[Done]:
    return [Done(**result) for result in json.loads((folder / f"results-{rank}.json").read_text())]


def answered(*arguments: str | Path, within: float = 20) -> Done:
    """Run the command line in this process as an attack, and return its well-formed output.

    An exception fails the test, as do other exit codes than 0, 1 and 2, an error of more than one
    line, what a terminal cannot show, and much text or time: of a processor, since others may
    have the machine.
    """
    out, error = io.StringIO(), io.StringIO()
    started, computed = time.monotonic(), time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = main([str(argument) for argument in arguments])
    assert time.process_time() - computed < within
    assert time.monotonic() - started < 10 * within
    done = Done(code, out.getvalue(), error.getvalue())
    assert code in (0, 1, 2), done
    # A progress bar may have come and gone before a line.
    errors = [line.rpartition("\r")[2] for line in done.error.split("\n") if line]
    # The metrics address is printed before the model is opened.
    said = [line for line in errors if line and not line.startswith("metrics: http://localhost:")]
    assert code != 2 or len(said) == 1, done
    for line in (*done.out.split("\n"), *errors):
        assert line.isprintable(), done
        assert len(line) <= 1100, done
    return done


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread, because the summation order changes the last bit."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_with_one_thread(arguments: list[str]) -> None:
    """For a fork: the whole command line."""
    with one_thread():
        sys.exit(main(arguments))


def run_on_full_disk(arguments: list[str], limit: int) -> None:
    """For a fork: the command line with a file size limit."""
    error = io.StringIO()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(error):
        code = main(arguments)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    print(error.getvalue(), flush=True)
    sys.exit(code)
