"""Stopping rules, shared processes and disturbed pairs of the benchmark."""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench_records import QUIET
from sleb_bench import conditions
from sleb_bench.conditions import Watch, disturbed
from sleb_bench.engine import EngineSpec
from sleb_bench.pace import PRECISE, TIME_OVER, Pace, calls_a_turn, is_due, warms_up
from sleb_bench.ratios import Ratio
from sleb_bench.variants import Variant, processes
from sleb_bench.workloads import workloads

NARROW, WIDE = Ratio(1.2, (1.19, 1.21), "blocks", 9), Ratio(1.2, (1.1, 1.3), "blocks", 9)


def begun(*values: Any, **more: Any) -> Pace:
    """A pace whose first engines are ready at once."""
    pace = Pace(*values, **more)
    pace.ready()
    return pace


class Clock:
    """Seconds that are set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.mark.parametrize(
    ("times", "goes_on"),
    [
        ([], True),
        ([2.0], True),
        ([2.0, 1.0], True),
        ([2.0, 1.0, 0.97], False),
        ([1.0, 1.0], False),
        ([1.0, 3.0], False),
        ([8.0, 7, 6, 5, 4, 3, 2, 1], False),
    ],
)
def test_warm_up_lasts_as_long_as_turns_get_faster(times: list[float], goes_on: bool) -> None:
    assert warms_up(times) == goes_on


def test_a_turn_takes_a_tenth_of_a_second_or_one_call() -> None:
    assert [calls_a_turn(seconds) for seconds in (30.0, 0.15, 0.033, 0.005)] == [1, 1, 3, 20]
    assert calls_a_turn(1e-9) == 256


def test_intervals_are_looked_at_less_often_the_more_pairs_there_are() -> None:
    judged = [0]
    for rounds in range(1, 400):
        if is_due(rounds, judged[-1]):
            judged.append(rounds)
    assert judged[1:17] == list(range(1, 17))
    assert judged[17:20] == [18, 20, 22]
    assert all(1.09 < b / a < 1.15 for a, b in pairwise(judged[17:]))


def test_a_start_goes_on_until_every_interval_is_narrow(clock: Clock) -> None:
    pace = begun(0.02, minutes=10, starts=1, apart=False, clock=clock)
    both = {"prefill": [NARROW, NARROW], "decode": [NARROW, WIDE]}
    assert pace.unfinished(both, start=1, rounds=6) == ["prefill", "decode"]  # too early to judge
    assert pace.unfinished(both, start=1, rounds=16) == ["decode"]
    assert pace.unfinished(both, start=1, rounds=17) == ["prefill", "decode"]  # half an order
    assert pace.verdict(both, start=1, seconds=10) is None
    clock.now = 10 * 60
    assert pace.unfinished(both, start=1, rounds=16) == []
    assert pace.verdict(both, start=1, seconds=10) == TIME_OVER
    assert pace.verdict({"prefill": [NARROW]}, start=1, seconds=10) == PRECISE


def test_time_counts_from_the_first_engines(clock: Clock) -> None:
    pace = Pace(0.02, minutes=1, starts=1, apart=False, clock=clock)
    clock.now = 300.0
    pace.ready()
    clock.now = 330.0
    pace.ready()
    assert pace.spent() == 0.5


def test_time_is_shared_among_the_starts(clock: Clock) -> None:
    pace = begun(0.02, minutes=9, starts=3, apart=False, clock=clock)
    wide = {"decode": [WIDE]}
    clock.now = 2.9 * 60
    assert pace.unfinished(wide, start=1, rounds=20) == ["decode"]
    clock.now = 3.1 * 60
    assert pace.unfinished(wide, start=1, rounds=20) == []
    assert pace.unfinished(wide, start=2, rounds=20) == ["decode"]
    # Of three starts the first need not be as precise as all of them.
    three_percent = {"decode": [Ratio(1.2, (1.2 / 1.03, 1.2 * 1.03), "blocks", 9)]}
    clock.now = 0
    assert pace.unfinished(three_percent, start=1, rounds=16) == []
    assert pace.unfinished(three_percent, start=3, rounds=16) == ["decode"]
    assert pace.verdict({"decode": [NARROW]}, start=1, seconds=10) is None
    # No start begins that would end too late.
    clock.now = 8.5 * 60
    assert pace.verdict(wide, start=2, seconds=20) is None
    assert pace.verdict(wide, start=2, seconds=40) == TIME_OVER


def test_engines_apart_are_started_again_rather_than_measured_longer(clock: Clock) -> None:
    wide = {"decode": [WIDE]}
    pace = begun(0.02, minutes=10, starts=3, apart=True, clock=clock)
    assert pace.unfinished(wide, start=1, rounds=16) == []
    assert pace.verdict(wide, start=9, seconds=10) is None
    # Engines of one process, too, where starts turn out to differ.
    together = begun(0.02, minutes=10, starts=3, apart=False, clock=clock)
    assert together.unfinished(wide, start=3, rounds=16) == ["decode"]
    differ = {"decode": [Ratio(1.2, (1.1, 1.3), "starts", 3)]}
    assert together.unfinished(differ, start=3, rounds=16) == []


def test_what_runs_on_one_cpu_in_one_environment_shares_a_process() -> None:
    vllm, other = EngineSpec("vllm", {}), EngineSpec("transformers", {})
    variants = [
        Variant("dense", 0, vllm, over=None),
        Variant("sleb2", 2, vllm),
        Variant("sleb2-export", 2, EngineSpec("vllm", {}, {"VLLM_PLUGINS": "none"})),
        Variant("sleb2-transformers", 2, other),
        Variant("sleb3", 3, EngineSpec("vllm", {"tensor_parallel_size": 2})),
    ]
    alone = {name: name for name in ("sleb2-export", "sleb2-transformers", "sleb3")}
    assert processes(variants, gpu=False) == {"dense": "shared", "sleb2": "shared", **alone}
    assert processes(variants, gpu=True) == {v.name: v.name for v in variants}


def test_a_watch_tells_what_others_did_and_what_was_stolen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = tmp_path / "stat"

    def machine(seconds: float, own: float, user: int, steal: int) -> None:
        """Ticks of a hundredth of a second, on two processors."""
        stat.write_text(f"cpu  {user} 0 10 500 0 0 0 {steal} 0 0\ncpu0 1 2\ncpu1 1 2\nintr 5\n")
        clock = SimpleNamespace(perf_counter=lambda: seconds, process_time=lambda: own)
        monkeypatch.setattr(conditions, "time", clock)

    monkeypatch.setattr(conditions, "_STAT", stat)
    monkeypatch.setattr("os.sysconf", {"SC_CLK_TCK": 100}.__getitem__)
    machine(seconds=5.0, own=1.0, user=1000, steal=7)
    watch = Watch()
    machine(seconds=7.0, own=3.5, user=1330, steal=27)
    cpu, found = watch.read()
    # Of 4 s of two processors 3.3 s were worked, 2.5 s of these by ourselves; 0.2 s were stolen.
    assert (cpu, found.others, found.steal) == pytest.approx((2.5, 0.2, 0.05))
    assert found.disturbed
    watch = Watch()
    machine(seconds=9.0, own=7.4, user=1727, steal=37)
    _, found = watch.read()
    # 0.07 s and 0.1 s of 4 s.
    assert (found.others, found.steal) == pytest.approx((0.0175, 0.025))
    assert not found.disturbed


def test_a_real_watch_counts_this_process() -> None:
    watch = Watch()
    sum(number * number for number in range(2_000_000))
    cpu, found = watch.read()
    assert cpu > 0.02
    assert all(v is None or 0 <= v <= 1 for v in (found.others, found.steal))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, False),
        ({"disturbed": True}, True),
        ({"mhz": 2000.0}, True),
        ({"mhz": 2550.0}, False),
    ],
)
def test_a_pair_is_disturbed_by_other_work_or_another_clock(
    change: dict[str, Any], expected: bool
) -> None:
    steady = {**QUIET, "mhz": 2600.0}
    assert disturbed(steady, {**steady, **change}) == expected
    assert disturbed({**steady, **change}, steady) == expected
    assert not disturbed(None, None)


def test_a_watch_counts_the_processes_that_this_one_started() -> None:
    pytest.importorskip("psutil")
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        try:
            time.sleep(0.5)  # its own start
            watch = Watch()
            time.sleep(0.5)
            cpu, _ = watch.read()
        finally:
            child.kill()
    assert 0.02 < cpu < 0.7


def test_lengths_are_those_that_their_names_say() -> None:
    sizes = {"prompt_length": 512, "batch": 3, "output_length": 16, "requests": 64}
    found = workloads(["1k/8k", "8k/1k"], **sizes)
    assert [(w.num_requests, w.prompt_length, w.output_length) for w in found] == [
        (3, 1024, 8192),
        (3, 8192, 1024),
    ]
    assert {w.measure for w in found} == {"generate"}
