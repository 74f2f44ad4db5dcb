"""A benchmark that a signal ends leaves no process and no port behind, and keeps its records."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import Models
from exports import manifest_for
from forking import end_fork, forks, start_fork
from sleb_serve.cli.main import main

pytest.importorskip("vllm")
psutil = pytest.importorskip("psutil")

from running import ForkedServer  # noqa: E402

ENGINE = ["--engine-args", '{"enforce_eager": true, "dtype": "float32"}']
SMALL = ["--prompt-length", "64", "--batch", "2", "--output-length", "8", "--precision", "0.01"]
WAYS = {
    "engines": (["--workloads", "prefill,decode", "--minutes", "30"], '"record": "sample"'),
    "servers": (["--workloads", "serving", "--requests", "8"], '"record": "server"'),
}
"""Options, and the record after which the run is stopped."""


def run_with_forks(arguments: list[str]) -> None:
    """For a fork: the command line, whose servers and engines are forks too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sleb_bench.engine.process_context", forks)
        # One call a turn.
        patch.setattr("sleb_bench.pace.TURN", 0.0)
        patch.setattr("sleb_bench.serving_load.Server", ForkedServer)
        sys.exit(main(arguments))


def writers(folder: Path) -> Iterator[Any]:
    """Processes with an open file in a folder: the run, its engines, its servers."""
    for process in psutil.process_iter():
        try:
            if any(Path(file.path).is_relative_to(folder) for file in process.open_files()):
                yield process
        except psutil.Error:
            continue


@pytest.mark.parametrize(
    ("way", "number"),
    [
        ("engines", signal.SIGINT),
        pytest.param("servers", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_benchmark_ends_its_processes_and_keeps_its_records(
    way: str, number: signal.Signals, models: Models, tmp_path: Path
) -> None:
    manifest, out, log = tmp_path / "m.json", tmp_path / "out", tmp_path / "log"
    path = models("llama")
    manifest_for(path, (1, 3)).write(manifest)
    options, after = WAYS[way]
    command = ["bench", str(path), "-m", str(manifest), "-o", str(out), *SMALL, *ENGINE, *options]
    child = start_fork(run_with_forks, log, command)
    records = out / "records.jsonl"
    try:
        while not (records.exists() and after in records.read_text()):
            assert child.is_alive(), log.read_text()
            time.sleep(0.1)
        time.sleep(1)
        assert list(writers(out))
        assert child.pid is not None
        os.kill(child.pid, number)
        child.join(60)
        text = log.read_text()
        assert child.exitcode == 128 + number, text
        assert "Traceback" not in text
        assert not list(writers(out)), list(writers(out))
    finally:
        end_fork(child)
    kept = [json.loads(line) for line in records.read_text().splitlines()]
    said = "interrupted" if number == signal.SIGINT else "stopped by SIGTERM"
    assert kept[-1] == {"record": "failure", "what": said}
    assert f"sleb-serve: {said}" in text
    assert not [file for file in out.iterdir() if file.name.startswith(".")]
    if way == "engines":
        assert main(["report", str(out)]) == 0
        assert said in (out / "report.md").read_text()
