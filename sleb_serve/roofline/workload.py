"""Workloads, including the paper's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

Prompts = Sequence[Sequence[int]]
"""Prompts as token ids."""


@dataclass(frozen=True)
class Workload:
    """A workload.

    ``measure`` defines its throughput: ``prefill``, prompt tokens over the wall time of the call;
    ``decode``, generated tokens except each sequence's first, from the moment all have their first
    to the last token; ``generate``, all generated tokens over the wall time including prefill.
    Lengths are in tokens.
    """

    name: str
    measure: str
    num_requests: int
    prompt_length: int
    output_length: int

    @property
    def unit(self) -> str:
        """Return the unit of its throughput."""
        return "prompt tokens/s" if self.measure == "prefill" else "generated tokens/s"

    @property
    def longest(self) -> int:
        """Return the tokens of a whole sequence."""
        return self.prompt_length + self.output_length

    def describe(self) -> str:
        """Describe its size in words."""
        return (
            f"{self.num_requests} x {self.prompt_length} tokens in, {self.output_length} out"
            f"{', all requests at once' if self.name == 'saturated' else ''}"
        )

    def prompts(self, vocabulary: int, seed: str) -> Prompts:
        """Return seeded random token ids without shared prefixes."""
        source = random.Random(f"{self.name} {seed}")
        return [
            [source.randrange(vocabulary) for _ in range(self.prompt_length)]
            for _ in range(self.num_requests)
        ]


OFFICIAL = (
    Workload("official-prompt", "prefill", 1, 2048, 1),
    Workload("official-generation", "generate", 64, 64, 128),
)
"""Return the SLEB paper's protocol: prompt latency and generation throughput (section 4.3)."""
