"""Kinds of load, as the paper's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

Prompts = Sequence[Sequence[int]]
"""Prompts as token ids."""


@dataclass(frozen=True)
class Workload:
    """One kind of load.

    ``measure`` says what counts: ``prefill``, prompt tokens over the wall time of the call;
    ``decode``, generated tokens but each sequence's first, from the moment when all have their
    first to the last token; ``generate``, all generated tokens over the wall time, prefill and all.
    Lengths are in tokens.
    """

    name: str
    measure: str
    num_requests: int
    prompt_length: int
    output_length: int

    @property
    def unit(self) -> str:
        """What its throughput is counted in."""
        return "prompt tokens/s" if self.measure == "prefill" else "generated tokens/s"

    @property
    def longest(self) -> int:
        """Tokens of a whole sequence."""
        return self.prompt_length + self.output_length

    def describe(self) -> str:
        """Its size in words."""
        return (
            f"{self.num_requests} x {self.prompt_length} tokens in, {self.output_length} out"
            f"{', all requests at once' if self.name == 'saturated' else ''}"
        )

    def prompts(self, vocabulary: int, seed: str) -> Prompts:
        """Random token ids, the same for the same seed: no prompt shares a prefix with another."""
        source = random.Random(f"{self.name} {seed}")
        return [
            [source.randrange(vocabulary) for _ in range(self.prompt_length)]
            for _ in range(self.num_requests)
        ]


OFFICIAL = (
    Workload("official-prompt", "prefill", 1, 2048, 1),
    Workload("official-generation", "generate", 64, 64, 128),
)
"""The SLEB paper's protocol: prompt latency and generation throughput (section 4.3)."""
