"""Reader for LLM-Drop's configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sleb_serve.convert.found import Found, block_numbers, check_count
from sleb_serve.errors import SlebError


def of_llm_drop(value: Mapping[str, Any], where: str, num_blocks: int) -> Found:
    """Read LLM-Drop's blocks in the order of ``drop_attn_list``.

    Both lists are in order of removal. For whole blocks, LLM-Drop writes the same list twice, so if
    the orders differ, neither is preferred; lists of booleans have no order.
    """
    key = "num_hidden_layers"
    if value.get(key) is not None:
        check_count(value[key], num_blocks, where, key)
    (attention, ordered), (mlp, _) = (
        _dropped(value.get(key), f"{where}: {key}", num_blocks)
        for key in ("drop_attn_list", "drop_mlp_list")
    )
    halves = [
        f"only the {half} of block {', '.join(map(str, sorted(blocks)))}"
        for half, blocks in (
            ("attention", set(attention) - set(mlp)),
            ("MLP", set(mlp) - set(attention)),
        )
        if blocks
    ]
    if halves:
        raise SlebError(f"{where} drops {' and '.join(halves)}; only whole blocks can be removed")
    return Found(attention if ordered else mlp, "LLM-Drop's config")


def _dropped(value: object, where: str, num_blocks: int) -> tuple[tuple[int, ...], bool]:
    """Return block numbers and whether they are ordered: lists of booleans have no order."""
    if value is None:
        return (), True
    if isinstance(value, list) and value and all(isinstance(entry, bool) for entry in value):
        check_count(len(value), num_blocks, where, "its length")
        return tuple(block for block, dropped in enumerate(value) if dropped), False
    return block_numbers(value, where), True
