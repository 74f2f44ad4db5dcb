"""Checks of block numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sleb_serve.checkpoint.decoder import MAX_BLOCKS
from sleb_serve.errors import SlebError
from sleb_serve.utils import strict_json


def gaps(removed: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return runs of consecutive blocks in `removed` as (first, last), ascending."""
    runs: list[tuple[int, int]] = []
    for block in sorted(removed):
        if runs and runs[-1][1] == block - 1:
            runs[-1] = (runs[-1][0], block)
        else:
            runs.append((block, block))
    return tuple(runs)


def block_count(value: object, where: str) -> int:
    """Parse a model's number of blocks strictly."""
    return strict_json.integer(value, where, 1, MAX_BLOCKS)


def check_blocks(blocks: Sequence[int], num_blocks: int, where: str) -> None:
    """Refuse a list of removed blocks that is empty, has duplicates, or keeps no block."""
    if not blocks:
        raise SlebError(f"{where} is empty: nothing is removed; serve the dense model with vllm")
    if len(set(blocks)) != len(blocks):
        twice, _ = Counter(blocks).most_common(1)[0]
        raise SlebError(f"{where} names block {twice} twice; each block can be removed once")
    if len(blocks) >= num_blocks:
        raise SlebError(f"{where} names all {num_blocks} blocks; at least one must remain")
