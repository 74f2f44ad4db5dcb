"""What is measured: prompt processing and generation, apart and as the paper does."""

from __future__ import annotations

from collections.abc import Sequence

from sleb_serve.errors import SlebError
from sleb_serve.roofline.workload import OFFICIAL, Workload

DECODE_PROMPT_LENGTH = 4
"""Short prompts: the decode workload is about generation, its processor seconds included."""
PREFILL_PROMPTS = 2

NAMES = ("prefill", "decode", "official", "saturated")


def workloads(
    names: Sequence[str], *, prompt_length: int, batch: int, output_length: int, requests: int
) -> tuple[Workload, ...]:
    """The workloads of these names.

    Args:
        names: of `NAMES`.
        prompt_length: of the prefill workload.
        batch: sequences of the decode workload.
        output_length: of the decode and the saturated workload.
        requests: of the saturated workload.

    Raises:
        SlebError: an unknown name, or no name at all.
    """
    known: dict[str, tuple[Workload, ...]] = {
        "prefill": (Workload("prefill", "prefill", PREFILL_PROMPTS, prompt_length, 1),),
        "decode": (Workload("decode", "decode", batch, DECODE_PROMPT_LENGTH, output_length),),
        "official": OFFICIAL,
        "saturated": (Workload("saturated", "generate", requests, 64, output_length),),
    }
    for name in names:
        if name not in known:
            raise SlebError(f"--workloads: {name} is not one of {', '.join((*NAMES, 'serving'))}")
    return tuple(workload for name in dict.fromkeys(names) for workload in known[name])
