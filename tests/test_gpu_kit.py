"""The kit that measures on a GPU: its steps' limits and records; tiny, on this CPU."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import run as kit_run
import stepping
from conftest import ROOT
from forking import run_fork
from kit import environment as kit_environment
from running import become
from stepping import RESULTS, Step, append, run_steps

KIT = ROOT / "benchmarks" / "gpu"
PRINTS = "import sys; print(sys.argv[1])"
HANGS = (
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    "print(child.pid, flush=True)\n"
    "time.sleep(60)"
)


def step(name: str, limit: float = 60, gpu_only: str = "") -> Step:
    return Step(name, limit, "", "", gpu_only)


def run(
    folder: Path, steps: Sequence[Step], code: dict[str, str], budget: float = 600
) -> list[dict[str, Any]]:
    """The records of steps that are small programs."""
    outcomes = run_steps(
        steps,
        lambda step: [sys.executable, "-c", code.get(step.name, PRINTS), step.name],
        folder,
        budget,
        gpu=False,
    )
    records = read(folder)
    assert [record["outcome"] for record in records] == outcomes
    return records


def read(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / RESULTS).read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_each_step_leaves_one_line_whatever_comes_of_it(tmp_path: Path) -> None:
    code = {"fails": "import sys; print('no kernel'); sys.exit(3)", "hangs": HANGS}
    steps = [step("works"), step("fails"), step("hangs", 1), step("eight-bit", 60, "needs a GPU")]
    begin = time.monotonic()
    works, fails, hangs, skipped = run(tmp_path, [*steps], code)
    assert time.monotonic() - begin < 30
    assert (works["step"], works["outcome"]) == ("works", "done")
    assert (tmp_path / "works.log").read_text() == "works\n"
    assert (fails["outcome"], fails["why"]) == ("failed", "exit code 3")
    assert "no kernel" in fails["log"]
    assert (hangs["outcome"], hangs["why"]) == ("stopped", "stopped after 1 s")
    assert (skipped["outcome"], skipped["why"]) == ("skipped", "needs a GPU")


def test_what_a_stopped_step_started_is_ended_with_it(tmp_path: Path) -> None:
    run(tmp_path, [step("hangs", 2)], {"hangs": HANGS})
    child = (tmp_path / "hangs.log").read_text().strip()
    # Gone, or dead and not yet collected by whoever adopted it.
    status = Path("/proc", child, "stat")
    deadline = time.monotonic() + 10
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("heeds", [True, False])
def test_a_stopped_step_can_save_what_it_has(tmp_path: Path, heeds: bool) -> None:
    saved = tmp_path / "saved"
    handler = f"lambda *_: (open({str(saved)!r}, 'w').close(), sys.exit(0))"
    code = (
        "import signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, {handler if heeds else 'signal.SIG_IGN'})\n"
        "time.sleep(60)"
    )
    (record,) = run(tmp_path / "results", [step("saves", 10)], {"saves": code})
    assert (record["outcome"], record["why"]) == ("stopped", "stopped after 10 s")
    assert record["seconds"] < 20
    assert saved.exists() == heeds


def test_a_line_is_on_disk_before_the_next_step_begins(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    count = f"print(len(open({str(folder / RESULTS)!r}).readlines()))"
    run(folder, [step("first"), step("second"), step("third")], dict.fromkeys(["third"], count))
    assert (folder / "third.log").read_text() == "2\n"


def test_a_small_budget_is_spent_on_the_first_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stepping, "LEAST", 1.0)
    code = {"second": "import time; time.sleep(60)"}
    records = run(tmp_path, [step("first"), step("second"), step("third")], code, budget=3)
    assert [record["outcome"] for record in records] == ["done", "stopped", "skipped"]
    # The budget ended it, not its own limit of a minute.
    assert records[1]["seconds"] < 10
    assert "of the budget" in records[2]["why"]


def test_the_most_valuable_steps_come_first(tmp_path: Path) -> None:
    wanted = ["lora", "heal", "equal", "env"]
    done = kit(tmp_path, "--tiny", "--steps", ",".join(wanted), "--budget", "1")
    assert done.returncode == 0
    records = read(tmp_path)
    assert [record["step"] for record in records] == ["env", "equal", "heal", "lora"]
    assert {record["outcome"] for record in records} == {"skipped"}


def test_an_unknown_step_is_refused_before_anything_runs(tmp_path: Path) -> None:
    done = kit(tmp_path, "--tiny", "--steps", "env,equality")
    assert done.returncode == 2
    assert "equality is not one of env, speed, equal" in done.stderr
    assert not (tmp_path / RESULTS).exists()


def kit(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(KIT / "run.py"), "--output", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_records_become_a_table_in_the_pages(tmp_path: Path) -> None:
    gpu = runpy.run_path(str(ROOT / "docs" / "gpu_parts.py"))["gpu"]
    assert gpu(tmp_path).startswith("No record yet")
    folder = tmp_path / "h100"
    folder.mkdir()
    result = {"record": "result", "step": "speed"}
    append(folder, {**result, "step": "env", "what": "versions", "gpu": "H100", "vllm": "0.32.0"})
    append(folder, {"record": "step", "step": "env", "outcome": "done", "seconds": 9.5})
    ratio = {"workload": "decode", "variant": "sleb7", "over": "dense"}
    append(folder, {**result, "what": "ratio", **ratio, "ratio": 1.2512, "ideal": 1.28})
    append(folder, {**result, "what": "x", "error": "a | b"})
    stopped = {"outcome": "stopped", "seconds": 280.0, "why": "stopped after 280 s"}
    append(folder, {"record": "step", "step": "speed", **stopped})
    lines = gpu(tmp_path).splitlines()
    assert lines[0] == "**h100**: gpu H100, vllm 0.32.0."
    assert lines[-2].startswith("| `env` | done | 9.5 | ")
    assert lines[-1] == (
        "| `speed` | stopped | 280.0 | stopped after 280 s<br>"
        "decode, sleb7 over dense: 1.251, ideal 1.280<br>x: a \\| b |"
    )


@pytest.mark.slow
def test_the_kit_runs_on_a_cpu_with_tiny_shapes(tmp_path: Path) -> None:
    """Equality, selection and healing for real; what needs a GPU is skipped by name.

    Steps are forks, which need not import vLLM.
    """
    pytest.importorskip("vllm")
    done = kit(tmp_path, "--tiny", "--steps", "fp8,sleep")
    assert done.returncode == 0, done.stdout[-3000:]
    records = read(tmp_path)
    assert {r["step"]: r["outcome"] for r in records} == {"fp8": "skipped", "sleep": "skipped"}
    for name in ("equal", "select", "heal"):
        known = {step.name: step for step in kit_run.STEPS}
        command = kit_run.command(known[name], tmp_path, tiny=True)[1:]
        log = tmp_path / f"{name}.log"
        code = run_fork(become, log, command, **kit_environment(tmp_path, tiny=True))
        assert code == 0, log.read_text()[-3000:]
    records = read(tmp_path)
    results = [r for r in records if r["record"] == "result"]
    assert not [r for r in results if "error" in r]
    equal = [r for r in results if r["what"] == "equality"]
    assert {r["model"] for r in equal} == {"llama", "qwen3_moe", "lfm2"}
    for r in equal:
        assert r["max_difference"] < 1e-3, r
        assert r["greedy_equal"] == 1
        assert r.get("equal", True)
    why = {r["what"]: r["skipped"] for r in results if "skipped" in r}
    assert set(why) == {"CUDA graphs", "bfloat16", "model runner 2"}
    greedy, fast = (r for r in results if r["what"] == "select")
    assert len(greedy["removed"]) == len(fast["removed"]) == 2
    # More than a pass of the states without a candidate, less than a pass for each.
    assert 2 * (8 + 7) < greedy["layer_runs"] < 2 * (6 * 7 + 5 * 6)
    (plain,) = (r for r in results if r["what"] == "plain passes")
    assert plain["passes_in_all"] == 6 + 5
    assert [r["checkpointing"] for r in results if r["what"] == "heal"] == [True, False]
