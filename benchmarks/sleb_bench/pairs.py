"""Pairs of neighbouring turns from the raw samples of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sleb_bench.conditions import disturbed
from sleb_bench.ratios import Ratio, paired_ratio
from sleb_bench.variants import uncapped
from sleb_serve.roofline.workload import Workload

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    """Neighbouring turns of two variants.

    Attributes:
        start: number of the engines' start, from 1.
        speed: tokens per second of the one over the other's.
        cpu: tokens per CPU-second of the one over the other's, or None.
        disturbed: see `conditions.disturbed`.
    """

    start: int
    speed: float
    cpu: float | None
    disturbed: bool


def tokens_of(workload: Workload, sample: Record) -> int:
    """Return the counted tokens of one turn."""
    if workload.measure == "prefill":
        return int(sample["total_input_tokens"])
    # The first token of each sequence belongs to the prefill.
    first = sample["num_requests"] if workload.measure == "decode" else 0
    return int(sample["total_output_tokens"] - first)


def pairs_of(workload: Workload, samples: Sequence[Record], name: str, over: str) -> list[Pair]:
    """Return the pairs of two variants in order of time, without warm-up."""
    turns: dict[str, dict[tuple[int, int], Record]] = {name: {}, over: {}}
    for sample in samples:
        # Rounds up to 0 are warm-up.
        if sample["round"] > 0 and sample["workload"] == workload.name:
            turns.get(sample["variant"], {})[sample["start"], sample["round"]] = sample
    return [
        _pair(workload, turns[name][place], turns[over][place])
        for place in sorted(turns[name].keys() & turns[over].keys())
    ]


def _pair(workload: Workload, one: Record, other: Record) -> Pair:
    done, of_other = tokens_of(workload, one), tokens_of(workload, other)
    cpu = None
    if one.get("cpu_time") and other.get("cpu_time"):
        cpu = (done / one["cpu_time"]) / (of_other / other["cpu_time"])
    return Pair(
        one["start"],
        (done / one["elapsed_time"]) / (of_other / other["elapsed_time"]),
        cpu,
        disturbed(one.get("conditions"), other.get("conditions")),
    )


def speed_ratio(pairs: Sequence[Pair], *, apart: bool) -> Ratio:
    """Return the ratio of speeds of at least one pair."""
    return paired_ratio(_by_start([(pair.start, pair.speed) for pair in pairs]), apart=apart)


def cpu_ratio(pairs: Sequence[Pair], *, apart: bool) -> Ratio | None:
    """Return the ratio of tokens per CPU-second; None if unknown for any pair."""
    known = [(pair.start, pair.cpu) for pair in pairs if pair.cpu is not None]
    return paired_ratio(_by_start(known), apart=apart) if len(known) == len(pairs) else None


def _by_start(values: Sequence[tuple[int, float]]) -> list[list[float]]:
    starts: dict[int, list[float]] = {}
    for start, value in values:
        starts.setdefault(start, []).append(value)
    return list(starts.values())


def compared(variants: Mapping[str, str | None]) -> Iterator[tuple[str, str]]:
    """Return pairs of variants to compare, from each variant's reference."""
    for name, over in variants.items():
        if over is not None:
            yield name, over
        if (base := uncapped(name)) is not None:
            yield base, name  # the gain from the larger KV cache on top of cheaper steps


def are_apart(engines: Sequence[Record], name: str, over: str) -> bool:
    """Return whether two variants' engines had separate processes, from their records."""
    processes = {
        engine["variant"]: engine["process"] for engine in engines if engine.get("process")
    }
    return name not in processes or processes[name] != processes.get(over)
