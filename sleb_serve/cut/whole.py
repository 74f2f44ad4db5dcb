"""The config of a whole model, with the decoder as one part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from sleb_serve.checkpoint.decoder import (
    at,
    count_of,
    decoder_path,
)
from sleb_serve.checkpoint.quantisation import QUANTISATION_KEYS
from sleb_serve.cut.config import Cut
from sleb_serve.cut.fed import check_entries, cut_entries
from sleb_serve.cut.keys import (
    BY_COUNT,
    BY_LAYER,
    LAYER_LETTERS,
    LAYER_NUMBERS,
    PER_LAYER,
)
from sleb_serve.cut.quantisation import Names, renumbered
from sleb_serve.errors import SlebError


def removable(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the blocks that can be removed individually.

    Args:
        config: a whole config.json, or what Transformers made of one.

    Raises:
        SlebError: there is none; the message gives the reason for the first block.
    """
    values = at(config, decoder_path(config) or ()) or {}
    num_blocks = count_of(values) or 0
    found: list[int] = []
    first: SlebError | None = None
    for block in range(num_blocks):
        cut = Cut(num_blocks, (block,))
        try:
            check_entries(config, cut)
            cut.values(values)
            found.append(block)
        except SlebError as error:
            first = first or error
    if not found and first is not None:
        raise first
    return tuple(found)


def cut_config(config: Mapping[str, Any], cut: Cut, names: Names | None = None) -> dict[str, Any]:
    """Return `config` with its decoder layers cut.

    Args:
        config: a whole config.json, or what Transformers made of one.
        cut: the removed layers.
        names: names of the checkpoint's modules, used in quantisation configs; None without a
            quantisation config.

    Raises:
        SlebError: see `Cut.values`.
    """
    path = decoder_path(config)
    if path is None:
        raise SlebError("the config does not give the number of layers")
    check_entries(config, cut)
    result = _replaced(config, path, cut.values)
    if path and count_of(config) == cut.num_blocks:
        # Some configs repeat the decoder's entries at the top level.
        result.update(cut.values({k: v for k, v in config.items() if k not in path}))
    result.update(cut_entries(config, cut))
    return result if names is None else with_names(result, names)


def with_names(config: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """Renumber the layers in a config's quantisation entry.

    Args:
        config: a whole config, or the decoder's.
        names: names of the checkpoint's modules.
    """
    result = dict(config)
    for place in dict.fromkeys(((), decoder_path(config) or ())):
        for key in QUANTISATION_KEYS:
            quantisation = (at(result, place) or {}).get(key)
            if isinstance(quantisation, Mapping):
                new = {key: renumbered(quantisation, names)}
                result = _replaced(result, place, partial(_updated, new))
    return result


def _updated(new: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {**values, **new}


def explicit(config: Mapping[str, Any], derived: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` with the layer attributes that Transformers derives made explicit.

    Args:
        config: config.json, which may define layer types by position.
        derived: the same config as loaded by Transformers.
    """
    path, other = decoder_path(config), decoder_path(derived)
    if path is None or other is None:
        return dict(config)
    count = count_of(at(config, path) or {})
    found = at(derived, other) or {}

    def said(values: Mapping[str, Any]) -> dict[str, Any]:
        more = {
            key: value
            for key, value in found.items()
            if (not values.get(key) and _is_by_layer(key, value, count))
            or (values.get(key) is None and value is not None and key in BY_COUNT)
        }
        return {**values, **more}

    return _replaced(config, path, said)


def _is_by_layer(key: str, value: Any, count: int | None) -> bool:
    if key in PER_LAYER or key in LAYER_LETTERS:
        return isinstance(value, list | str) and len(value) == count
    return bool(value) and key in LAYER_NUMBERS | BY_LAYER


def _replaced(
    config: Mapping[str, Any],
    path: Sequence[str],
    change: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> dict[str, Any]:
    if not path:
        return change(config)
    return {**config, path[0]: _replaced(config[path[0]], path[1:], change)}
