"""A model as sizes: the parameters, bytes and caches of each decoder block."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

BYTES = 2
"""Of a number in the KV cache, and of a weight that vLLM computes with: float16 or bfloat16."""
_USUAL_LENGTH = 2048
"""Tokens of the sequences for which the tokens of a KV cache are counted."""


@dataclass(frozen=True)
class Cache:
    """What a block keeps of one sequence.

    Attributes:
        token: bytes of KV cache a token.
        window: how many of the last tokens are kept; None for all.
        state: bytes that do not grow with the sequence, as Mamba's.
        width: numbers of a query over all heads, by which attention's arithmetic grows.
    """

    token: int = 0
    window: int | None = None
    state: int = 0
    width: int = 0

    def size(self, tokens: float) -> float:
        """Bytes for a sequence of so many tokens."""
        return self.state + self.token * self.seen(tokens)

    def seen(self, tokens: float) -> float:
        """How many of the last tokens attention reads."""
        return tokens if self.window is None else min(tokens, self.window)


@dataclass(frozen=True)
class Block:
    """One decoder block.

    Attributes:
        parameters: those that every token goes through, and ``stored``, their bytes.
        cache: what it keeps of a sequence.
        experts: how many experts it has, of which each token goes through ``active``.
        expert_parameters: of one expert, and ``expert_stored``, their bytes.
    """

    parameters: float
    stored: float
    cache: Cache = Cache()
    experts: int = 0
    active: int = 0
    expert_parameters: float = 0
    expert_stored: float = 0

    @property
    def all_parameters(self) -> float:
        """With all experts."""
        return self.parameters + self.experts * self.expert_parameters

    @property
    def all_stored(self) -> float:
        """Bytes with all experts."""
        return self.stored + self.experts * self.expert_stored

    def read(self, tokens: float) -> float:
        """Bytes of weights that a step of so many tokens reads.

        Of the experts, those that a token is expected to choose: each token chooses ``active`` of
        them, all equally likely.
        """
        if not self.experts:
            return self.stored
        others: float = (1 - self.active / self.experts) ** tokens
        chosen = self.experts * (1 - others)
        return self.stored + chosen * self.expert_stored


@dataclass(frozen=True)
class Model:
    """The sizes of a model.

    Attributes:
        name: what it is called.
        blocks: its decoder blocks.
        hidden: numbers of a token's hidden state.
        heads: attention heads, which tensor parallelism divides; 0 where there are none.
        vocabulary: rows of the head.
        outside: parameters outside the decoder blocks, and ``outside_stored``, their bytes.
    """

    name: str
    blocks: tuple[Block, ...]
    hidden: int
    heads: int
    vocabulary: int
    outside: float
    outside_stored: float

    @property
    def num_blocks(self) -> int:
        """How many decoder blocks it has."""
        return len(self.blocks)

    @property
    def parameters(self) -> float:
        """Of all of it."""
        return self.outside + sum(block.all_parameters for block in self.blocks)

    @property
    def stored(self) -> float:
        """Bytes of all weights."""
        return self.outside_stored + sum(block.all_stored for block in self.blocks)

    @cached_property
    def kinds(self) -> Mapping[Block, int]:
        """The blocks that differ, and how many there are of each."""
        return MappingProxyType(Counter(self.blocks))

    def share(self, removed: int) -> float:
        """What is left of the blocks: every removed one counts as their average."""
        return 1 - removed / len(self.blocks)

    def weights(self, removed: int) -> float:
        """Bytes of the weights without so many blocks."""
        return self.outside_stored + self.share(removed) * (self.stored - self.outside_stored)

    def cache_size(self, removed: int, tokens: float) -> float:
        """Bytes that a sequence of so many tokens takes, without so many blocks."""
        return self.share(removed) * sum(
            number * block.cache.size(tokens) for block, number in self.kinds.items()
        )

    def in_16_bit(self) -> Model:
        """A model stored in float32, as vLLM holds it."""

        def halved(block: Block) -> Block:
            return replace(block, stored=block.stored / 2, expert_stored=block.expert_stored / 2)

        return replace(
            self,
            blocks=tuple(map(halved, self.blocks)),
            outside_stored=self.outside_stored / 2,
        )


def kv_tokens(free: float, caches: Sequence[Cache], length: int = _USUAL_LENGTH) -> int:
    """Tokens of KV cache in ``free`` bytes; 0 where there are none.

    Args:
        free: what weights leave of the memory.
        caches: of the blocks that stay.
        length: of the sequences in it. It counts only with sliding windows and states.
    """
    size = sum(cache.size(length) for cache in caches)
    return max(0, math.floor(free * length / size)) if size else 0


def llama(
    name: str,
    num_blocks: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocabulary: int,
) -> Model:
    """A Llama with 16-bit weights and heads of 128, norms apart."""
    parameters = hidden * 128 * 2 * (heads + kv_heads) + 3 * hidden * intermediate
    cache = Cache(token=2 * kv_heads * 128 * BYTES, width=heads * 128)
    outside = 2 * hidden * vocabulary
    blocks = (Block(parameters, parameters * BYTES, cache),) * num_blocks
    return Model(name, blocks, hidden, heads, vocabulary, outside, outside * BYTES)


# As in the models' published configs.
MODELS: Mapping[str, Model] = MappingProxyType(
    {
        model.name: model
        for model in (
            llama("llama-2-7b", 32, 4096, 32, 32, 11008, 32000),
            llama("llama-2-13b", 40, 5120, 40, 40, 13824, 32000),
            llama("llama-2-70b", 80, 8192, 64, 8, 28672, 32000),
            llama("llama-3-8b", 32, 4096, 32, 8, 14336, 128256),
            llama("llama-3-70b", 80, 8192, 64, 8, 28672, 128256),
        )
    }
)
