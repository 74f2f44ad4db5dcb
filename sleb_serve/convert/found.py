"""Blocks read from another tool's list."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sleb_serve.checkpoint.decoder import MAX_BLOCKS
from sleb_serve.errors import SlebError
from sleb_serve.utils import strict_json


@dataclass(frozen=True)
class Found:
    """Removed blocks, in order if it is known, and their source."""

    blocks: tuple[int, ...]
    form: str


def block_numbers(value: object, where: str) -> tuple[int, ...]:
    """Parse a list of block numbers."""
    why = None
    if isinstance(value, list):
        why = next((why for entry in value if (why := _why_no_block(entry))), None)
        if why is None:
            return tuple(value)
    reason = "" if why is None else f": {why}"
    raise SlebError(f"{where} is not a list of block numbers{reason}; give one as [5, 4, 9]")


def _why_no_block(entry: object) -> str | None:
    if isinstance(entry, bool):
        return f"it holds {str(entry).lower()}"
    if isinstance(entry, int):
        if entry < 0:
            return "it holds a negative number, and blocks count from 0"
        return "it holds a number beyond any model's blocks" if entry > MAX_BLOCKS else None
    if isinstance(entry, float):
        return f"it holds {entry}; whole numbers have no fraction"
    if isinstance(entry, str):
        return f"it holds the text {strict_json.short(entry)}"
    return "it holds something else than numbers"


def check_count(count: object, num_blocks: int, where: str, key: str) -> None:
    """Refuse a source for a model with a different number of blocks."""
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MAX_BLOCKS:
        raise SlebError(f"{where}: {key} is not a number of blocks; correct it or remove it")
    if count != num_blocks:
        raise SlebError(
            f"{where} is of a model with {count} blocks ({key}), this one has {num_blocks}; give "
            f"that model"
        )


def plain_key(key: object) -> str:
    """Convert a key to snake case."""
    return str(key).lower().replace(" ", "_").replace("-", "_")


def check_keys(keys: Iterable[str], where: str) -> None:
    """Refuse duplicate keys in an object."""
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise SlebError(
                f"{where}: key {strict_json.short(key)} stands twice in one object; remove one"
            )
        seen.add(key)
