"""Decoder layers with input from a vision tower."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sleb_serve.cut.config import Cut
from sleb_serve.cut.errors import INSTEAD, read_as_layers
from sleb_serve.cut.keys import (
    FED_BY_MAP,
    FED_FIRST,
    FED_LAYERS,
)
from sleb_serve.errors import SlebError


def check_entries(config: Mapping[str, Any], cut: Cut) -> None:
    """Refuse to remove blocks with input from another part of the model.

    Args:
        config: the whole config.
        cut: the removed layers.

    Raises:
        SlebError: names the block and the key.
    """
    for part in _parts(config):
        for key in (FED_FIRST, FED_BY_MAP, FED_LAYERS):
            with read_as_layers(key, part.get(key)):
                lost = sorted(set(_entries(key, part.get(key) or ())) & set(cut.removed))
            if lost:
                raise SlebError(
                    f"block {lost[0]} receives the vision tower's features ({key}), so it cannot "
                    f"be removed; {INSTEAD}"
                )


def cut_entries(values: Mapping[str, Any], cut: Cut) -> dict[str, Any]:
    """Renumber a config's list of decoder layers with input from a vision tower."""
    found: dict[str, Any] = {}
    if values.get(FED_BY_MAP):
        found[FED_BY_MAP] = [[tower, cut.place(layer)] for tower, layer in values[FED_BY_MAP]]
    if values.get(FED_LAYERS):
        found[FED_LAYERS] = [cut.place(layer) for layer in values[FED_LAYERS]]
    return found


def _entries(key: str, value: Any) -> list[int]:
    """Return the decoder layers with input from a vision tower, from one of its keys."""
    if key == FED_FIRST:
        # The n listed tower layers feed the decoder's first n layers.
        return list(range(len(value)))
    return [layer for _, layer in value] if key == FED_BY_MAP else list(value)


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a config and its nested configs."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _parts(value)
