"""Workloads: prompt processing and generation, separately and as in the paper."""

from __future__ import annotations

from collections.abc import Sequence

from sleb_bench.records import SERVING, SLO
from sleb_serve.errors import SlebError
from sleb_serve.roofline.workload import OFFICIAL, Workload

DECODE_PROMPT_LENGTH = 4
"""Short prompts, because the decode workload measures generation, including its CPU-seconds."""

LENGTHS = {"1k/1k": (1024, 1024), "1k/8k": (1024, 8192), "8k/1k": (8192, 1024)}
"""Input and output tokens, named as in public benchmarks."""
NAMES = ("prefill", "decode", "official", "saturated", *LENGTHS)


def workloads(
    names: Sequence[str], *, prompt_length: int, batch: int, output_length: int, requests: int
) -> tuple[Workload, ...]:
    """Return workloads by name.

    Args:
        names: names from `NAMES`.
        prompt_length: prompt length of the prefill workload.
        batch: sequences of the decode workload and those in `LENGTHS`.
        output_length: output length of the decode and saturated workloads.
        requests: requests of the saturated workload.

    Raises:
        SlebError: a name is unknown, or there are none.
    """
    known: dict[str, tuple[Workload, ...]] = {
        "prefill": (Workload("prefill", "prefill", 1, prompt_length, 1),),
        "decode": (Workload("decode", "decode", batch, DECODE_PROMPT_LENGTH, output_length),),
        "official": OFFICIAL,
        "saturated": (Workload("saturated", "generate", requests, 64, output_length),),
        **{
            name: (Workload(name, "generate", batch, *lengths),)
            for name, lengths in LENGTHS.items()
        },
    }
    for name in names:
        if name not in known:
            every = ", ".join((*NAMES, SERVING, SLO))
            raise SlebError(f"--workloads: {name} is not one of {every}")
    return tuple(workload for name in dict.fromkeys(names) for workload in known[name])
