"""Decoder layers that take in what a vision tower gives."""

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
    """Refuse to remove blocks into which another part of the model feeds.

    Args:
        config: a whole config, of all parts.
        cut: the layers that go.

    Raises:
        SlebError: naming the block and the key.
    """
    for part in _parts(config):
        for key in (FED_FIRST, FED_BY_MAP, FED_LAYERS):
            with read_as_layers(key, part.get(key)):
                lost = sorted(set(_entries(key, part.get(key) or ())) & set(cut.removed))
            if lost:
                raise SlebError(
                    f"block {lost[0]} takes in what a vision tower gives ({key}), so it cannot be "
                    f"removed; {INSTEAD}"
                )


def cut_entries(values: Mapping[str, Any], cut: Cut) -> dict[str, Any]:
    """What a config says of the decoder layers that a vision tower feeds, renumbered."""
    found: dict[str, Any] = {}
    if values.get(FED_BY_MAP):
        found[FED_BY_MAP] = [[tower, cut.place(layer)] for tower, layer in values[FED_BY_MAP]]
    if values.get(FED_LAYERS):
        found[FED_LAYERS] = [cut.place(layer) for layer in values[FED_LAYERS]]
    return found


def _entries(key: str, value: Any) -> list[int]:
    """The decoder layers that take in what a vision tower gives, as one of its keys says."""
    if key == FED_FIRST:
        # The tower's layers listed there feed the decoder's first, as many.
        return list(range(len(value)))
    return [layer for _, layer in value] if key == FED_BY_MAP else list(value)


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A config and those nested in it."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _parts(value)
