"""Reads and writes mergekit's passthrough configurations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from sleb_serve.convert.found import Found, block_numbers
from sleb_serve.errors import SlebError
from sleb_serve.manifest.blocks import gaps
from sleb_serve.manifest.schema import Manifest
from sleb_serve.utils import strict_json
from sleb_serve.utils.outputs import beginning_with

MERGEKIT = beginning_with("a mergekit configuration", rb"merge_method: passthrough\n")


MERGEKIT_TOP = {
    "slices",
    "merge_method",
    "parameters",
    "base_model",
    "dtype",
    "out_dtype",
    "tokenizer",
    "tokenizer_source",
    "chat_template",
}


_MERGEKIT_IGNORED = {"int8_mask", "normalize"}
"""Parameters of other merge methods, often left in a file; passthrough uses only scale."""


def mergekit_config(model: str, manifest: Manifest, dtype: str) -> str:
    """Return a mergekit passthrough configuration for the pruned model."""
    removed = manifest.pruning().removed
    lines = ["merge_method: passthrough", f"dtype: {dtype}", "slices:"]
    for first, last in gaps([i for i in range(manifest.model.num_blocks) if i not in removed]):
        lines += [
            "  - sources:",
            f"      - model: {json.dumps(model)}",
            f"        layer_range: [{first}, {last + 1}]",
        ]
    return "\n".join(lines) + "\n"


def of_mergekit(value: Mapping[str, Any], where: str, num_blocks: int) -> Found:
    """Return the blocks that a passthrough merge drops."""
    if value.get("merge_method", "passthrough") != "passthrough":
        raise SlebError(f"{where} merges models; only merge_method: passthrough removes blocks")
    _check_known(value, MERGEKIT_TOP, where)
    _check_parameters(value.get("parameters"), where)
    slices = value.get("slices")
    if not isinstance(slices, list) or not slices:
        raise SlebError(f"{where} has no list of slices; without them no blocks are removed")
    kept: list[int] = []
    models = set() if value.get("base_model") is None else {_model(value["base_model"], where)}
    for i, entry in enumerate(slices):
        place = f"{where}: slices[{i}]"
        sources = entry.get("sources") if isinstance(entry, dict) else None
        if not isinstance(sources, list) or len(sources) != 1 or not isinstance(sources[0], dict):
            raise SlebError(f"{place} must have one source; several are merged, not removed")
        source = sources[0]
        _check_known(entry, {"sources", "parameters", "base_model"}, place)
        _check_known(source, {"model", "layer_range", "parameters"}, f"{place}.sources[0]")
        for part in (entry, source):
            _check_parameters(part.get("parameters"), place)
        models.add(_model(source.get("model"), place))
        if entry.get("base_model") is not None:
            models.add(_model(entry["base_model"], place))
        limits = block_numbers(source.get("layer_range"), f"{place}: layer_range")
        if len(limits) != 2 or not 0 <= limits[0] <= limits[1] <= num_blocks:
            raise SlebError(
                f"{place}: layer_range {list(limits[:3])} does not lie within the model's "
                f"{num_blocks} blocks"
            )
        kept += range(*limits)
    if len(models) > 1:
        raise SlebError(f"{where} uses blocks of several models; give blocks of one")
    if any(after <= before for before, after in pairwise(kept)):
        raise SlebError(f"{where} repeats or moves blocks; only removals can be imported")
    return Found(tuple(i for i in range(num_blocks) if i not in set(kept)), "mergekit's slices")


def _check_known(value: Mapping[Any, Any], known: set[str], where: str) -> None:
    unknown = next((key for key in value if key not in known and value[key] is not None), None)
    if unknown is not None:
        raise SlebError(
            f"{where} has {_name(unknown)}, which is unknown; remove it if it does not change "
            "weights"
        )


def _check_parameters(value: object, where: str) -> None:
    if value is None or value == {}:
        return
    if not isinstance(value, dict):
        raise SlebError(f"{where}: parameters is not an object; correct it or remove it")
    name = next((name for name in value if name not in _MERGEKIT_IGNORED), None)
    if name is not None:
        raise SlebError(
            f"{where} has parameters ({_name(name)}), which change weights; only removals can be "
            f"imported"
        )


def _name(key: object) -> str:
    return strict_json.short(key) if isinstance(key, str) else "a key that is no text"


def _model(value: object, where: str) -> str:
    """Return a mergekit model reference as a text, if it is a plain model."""
    if isinstance(value, dict):
        if value.get("lora") is not None or value.get("adapter") is not None:
            raise _adapter(where)
        _check_known(value, {"model", "path", "revision", "lora", "adapter"}, f"{where}: model")
        path = value.get("model", value)
        if isinstance(path, dict):
            if path is not value:
                _check_known(path, {"path", "revision"}, f"{where}: model")
            value, revision = path.get("path"), path.get("revision")
            if isinstance(value, str) and isinstance(revision, str):
                value = f"{value}@{revision}"
        else:
            value = path
    if not isinstance(value, str) or not value:
        raise SlebError(f"{where} names no model; give one as mergekit does, model: owner/name")
    if "+" in value:
        raise _adapter(where)
    return value


def _adapter(where: str) -> SlebError:
    return SlebError(
        f"{where} merges an adapter into the model; merge it first, and import the slices with the "
        f"merged model"
    )
