"""A model's sizes: parameters, bytes and caches of each decoder block."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

BYTES = 2
"""Bytes of a KV cache value or a weight in vLLM: float16 or bfloat16."""
_USUAL_LENGTH = 2048
"""Sequence length for counting the tokens of a KV cache."""


@dataclass(frozen=True)
class Cache:
    """A block's cache for one sequence.

    Attributes:
        token: bytes of KV cache per token.
        window: number of last tokens kept; None for all.
        state: bytes independent of the length, such as Mamba's state.
        width: query size over all heads, which determines attention's arithmetic.
    """

    token: int = 0
    window: int | None = None
    state: int = 0
    width: int = 0

    def size(self, tokens: float) -> float:
        """Return the bytes for a sequence of this length."""
        return self.state + self.token * self.seen(tokens)

    def seen(self, tokens: float) -> float:
        """Return how many last tokens attention reads."""
        return tokens if self.window is None else min(tokens, self.window)


@dataclass(frozen=True)
class Block:
    """One decoder block.

    Attributes:
        parameters: parameters used by every token, and ``stored``, their bytes.
        cache: its cache for a sequence.
        experts: number of experts; each token uses ``active`` of them.
        expert_parameters: parameters of one expert, and ``expert_stored``, their bytes.
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
        """Return the parameters with all experts."""
        return self.parameters + self.experts * self.expert_parameters

    @property
    def all_stored(self) -> float:
        """Return the bytes with all experts."""
        return self.stored + self.experts * self.expert_stored

    def read(self, tokens: float) -> float:
        """Return the bytes of weights read by a step with this many tokens.

        This includes the expected number of chosen experts: each token chooses ``active`` of them,
        all equally likely.
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
        name: its name.
        blocks: its decoder blocks.
        hidden: hidden size.
        heads: attention heads, which tensor parallelism divides; 0 without attention.
        vocabulary: number of rows of the head.
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
        """Return the number of decoder blocks."""
        return len(self.blocks)

    @property
    def parameters(self) -> float:
        """Return all parameters."""
        return self.outside + sum(block.all_parameters for block in self.blocks)

    @property
    def stored(self) -> float:
        """Return the bytes of all weights."""
        return self.outside_stored + sum(block.all_stored for block in self.blocks)

    @cached_property
    def kinds(self) -> Mapping[Block, int]:
        """Return the distinct blocks and the number of each."""
        return MappingProxyType(Counter(self.blocks))

    def share(self, removed: int) -> float:
        """Return the kept share of the blocks; a removed block counts as the average."""
        return 1 - removed / len(self.blocks)

    def weights(self, removed: int) -> float:
        """Return the bytes of the weights with this many blocks removed."""
        return self.outside_stored + self.share(removed) * (self.stored - self.outside_stored)

    def cache_size(self, removed: int, tokens: float) -> float:
        """Return the cache bytes of a sequence with this many blocks removed."""
        return self.share(removed) * sum(
            number * block.cache.size(tokens) for block, number in self.kinds.items()
        )

    def in_16_bit(self) -> Model:
        """Return a float32 model's sizes in vLLM."""

        def halved(block: Block) -> Block:
            return replace(block, stored=block.stored / 2, expert_stored=block.expert_stored / 2)

        return replace(
            self,
            blocks=tuple(map(halved, self.blocks)),
            outside_stored=self.outside_stored / 2,
        )


def kv_tokens(free: float, caches: Sequence[Cache], length: int = _USUAL_LENGTH) -> int:
    """Return the tokens of KV cache in ``free`` bytes, at least 0.

    Args:
        free: memory left by the weights.
        caches: caches of the kept blocks.
        length: sequence length, which matters only for sliding windows and states.
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
    """Return a Llama with 16-bit weights and heads of 128, without norms."""
    parameters = hidden * 128 * 2 * (heads + kv_heads) + 3 * hidden * intermediate
    cache = Cache(token=2 * kv_heads * 128 * BYTES, width=heads * 128)
    outside = 2 * hidden * vocabulary
    blocks = (Block(parameters, parameters * BYTES, cache),) * num_blocks
    return Model(name, blocks, hidden, heads, vocabulary, outside, outside * BYTES)


# From the models' published configs.
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
