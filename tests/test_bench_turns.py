"""The order of turns, on fake engines with given times."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench_records import QUIET
from sleb_bench import turns
from sleb_bench.engine import EngineSpec, Sample
from sleb_bench.pace import TIME_OVER, Pace
from sleb_bench.records import Records
from sleb_bench.turns import Plan, measure_by_turns
from sleb_bench.variants import Variant
from sleb_serve.roofline.workload import Workload

DECODE = Workload("decode", "decode", 4, 8, 11)
VLLM = EngineSpec("vllm", {})
DENSE, PRUNED = Variant("dense", 0, VLLM, over=None), Variant("sleb2", 2, VLLM)
EXPORT = Variant("sleb2-export", 2, EngineSpec("vllm", {}, {"VLLM_PLUGINS": "none"}), over="sleb2")
Measure = Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Measures variants whose calls take so many seconds and some noise; what ended it, records."""
    alive: list[set[str]] = []

    def run(
        variants: list[Variant], seconds: dict[str, float], noise: float = 0.01, **changes: Any
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        source, now = random.Random(4), [0.0]
        if changes.pop("passing", False):  # time passes as the calls take it
            pace = partial(Pace, clock=lambda: now[0])
            monkeypatch.setattr(turns, "Pace", pace)

        class Host:
            def __init__(self, environment: object, log: Path) -> None:
                self.engines: set[str] = set()
                alive.append(self.engines)

            def start(self, name: str, spec: EngineSpec) -> dict[str, Any]:
                self.engines.add(name)
                return {"startup_time": 1.0, "kv_cache_blocks": 7, "memory_bytes": None}

            def ask(self, name: str, action: str, workload: Workload, calls: list[Any]) -> Sample:
                assert (action, name in self.engines) == ("measure", True)
                if changes.get("one_at_a_time"):
                    assert sum(map(len, alive)) == 1
                took = seconds[name] * len(calls) * (1 + noise * source.random())
                now[0] += took
                return Sample(took, 2 * took, 4 * len(calls), 32, 44 * len(calls), QUIET)

            def close(self) -> None:
                self.engines.clear()

        monkeypatch.setattr(turns, "Host", Host)
        values: dict[str, Any] = {
            "todo": [DECODE],
            "draw": lambda workload, seed: [seed],
            "sequences": (),
            "output": tmp_path,
            "precision": 0.02,
            "minutes": 0.5,
            "starts": 1,
            "one_at_a_time": False,
            "profile": False,
        }
        records = Records(tmp_path)
        end = measure_by_turns(Plan(**{**values, **changes}), variants, records, lambda text: None)
        return end, records.entries

    return run


def samples(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in entries if entry["record"] == "sample"]


def test_turns_take_a_tenth_of_a_second_and_who_goes_first_changes(measure: Measure) -> None:
    end, entries = measure([DENSE, PRUNED], {"dense": 0.025, "sleb2": 0.02})
    assert (end["why"], end["starts"]) == ("precise", 1)
    found = samples(entries)
    order = [s["variant"] for s in found if s["round"] > 0]
    assert order == ["dense", "sleb2", "sleb2", "dense", "sleb2", "dense", "dense", "sleb2"] * 4
    # Four calls of a fortieth of a second, of either engine, after a first turn of one.
    assert {s["num_requests"] for s in found if s["round"] > 0} == {16}
    assert [s["num_requests"] for s in found if s["round"] == 0] == [4, 4]
    assert {s["round"] for s in found} == set(range(-1, 17))


def test_long_turns_are_warmed_up_once_and_measured_twice_whatever_the_limit(
    measure: Measure,
) -> None:
    end, entries = measure(
        [DENSE, PRUNED], {"dense": 70.0, "sleb2": 50.0}, noise=0.2, minutes=3, passing=True
    )
    assert [s["round"] for s in samples(entries)] == [0, 0, 1, 1, 2, 2]
    assert end["why"] == TIME_OVER


def test_a_noisy_run_takes_more_pairs_and_no_more_than_it_needs(measure: Measure) -> None:
    times = {"dense": 1.0, "sleb2": 0.8}
    _, quiet = measure([DENSE, PRUNED], times, noise=0.01)
    end, noisy = measure([DENSE, PRUNED], times, noise=0.15)
    assert end["why"] == "precise"
    assert len(samples(noisy)) > len(samples(quiet))


def test_engines_apart_are_started_again_and_again(measure: Measure) -> None:
    times = {"dense": 1.0, "sleb2": 0.8, "sleb2-export": 0.8}
    end, entries = measure([DENSE, PRUNED, EXPORT], times, starts=3)
    assert (end["why"], end["starts"]) == ("precise", 3)
    engines = [entry for entry in entries if entry["record"] == "engine"]
    # Another engine is first in each start.
    assert [entry["variant"] for entry in engines[::3]] == ["dense", "sleb2", "sleb2-export"]
    assert {entry["process"] for entry in engines} == {"shared", "sleb2-export"}
    for start in (1, 2, 3):
        rounds = {s["round"] for s in samples(entries) if s["start"] == start}
        # Sixteen at most, and fewer where that is enough.
        assert 4 <= max(rounds) <= 16


def test_one_at_a_time_no_two_engines_live(measure: Measure) -> None:
    times = {"dense": 1.0, "sleb2": 0.8}
    end, entries = measure([DENSE, PRUNED], times, starts=2, one_at_a_time=True)
    assert end["starts"] >= 2
    processes = {e["variant"]: e["process"] for e in entries if e["record"] == "engine"}
    assert processes == {"dense": "dense", "sleb2": "sleb2"}


def test_a_cap_is_that_of_the_dense_engine_which_starts_first(measure: Measure) -> None:
    capped = Variant("sleb2-capped", 2, VLLM, capped=True)
    times = {"dense": 1.0, "sleb2": 0.8, "sleb2-capped": 0.8}
    _, entries = measure([DENSE, PRUNED, capped], times, starts=3)
    started = [entry["variant"] for entry in entries if entry["record"] == "engine"]
    assert all(started[at : at + 3][-1] == "sleb2-capped" for at in (0, 3, 6))
