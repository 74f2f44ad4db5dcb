"""What is measured: prompt processing and generation, apart and as the paper does."""

from __future__ import annotations

from collections.abc import Sequence

from sleb_bench.records import SERVING, SLO
from sleb_serve.errors import SlebError
from sleb_serve.roofline.workload import OFFICIAL, Workload

DECODE_PROMPT_LENGTH = 4
"""Short prompts: the decode workload is about generation, its processor seconds included."""

LENGTHS = {"1k/1k": (1024, 1024), "1k/8k": (1024, 8192), "8k/1k": (8192, 1024)}
"""Tokens in and out, as public benchmarks name them."""
NAMES = ("prefill", "decode", "official", "saturated", *LENGTHS)


def workloads(
    names: Sequence[str], *, prompt_length: int, batch: int, output_length: int, requests: int
) -> tuple[Workload, ...]:
    """The workloads of these names.

    Args:
        names: of `NAMES`.
        prompt_length: of the prefill workload.
        batch: sequences of the decode workload, and of those in `LENGTHS`.
        output_length: of the decode and the saturated workload.
        requests: of the saturated workload.

    Raises:
        SlebError: an unknown name, or no name at all.
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
