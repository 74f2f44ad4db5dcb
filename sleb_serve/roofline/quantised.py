"""Stored bytes of a quantised matrix, from the config alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from sleb_serve.checkpoint.quantisation import QUANTISATION_KEYS
from sleb_serve.errors import SlebError, first_line

Config = Mapping[str, Any]
IGNORED = ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules")
"""Keys that list unquantised modules."""


_BESIDE = frozenset(
    ("qzeros", "scales", "g_idx", "weight_shape", "weight_zero_point", "weight_g_idx", "absmax")
    + ("input_scale", "weight_scale_2", "input_global_scale", "weight_global_scale", "quant_map")
)
_SCALES = ("weight_scale", "weight_scale_inv", "_scales")
"""Auxiliary tensors of quantised weights, by name and by suffix."""


def bytes_of(config: Config, rows: int, columns: int, scale: int) -> float:
    """Return the bytes of a matrix, including scales and zero points.

    Args:
        config: what config.json says of the quantisation.
        rows: outputs.
        columns: inputs.
        scale: bytes of a scale with the model's dtype.

    Raises:
        SlebError: the method's format is unknown.
    """
    method = config.get("quant_method")
    found = _METHODS.get(method) if isinstance(method, str) else None
    if found is None:
        raise SlebError(
            f"the size of {method or 'so quantised'} weights cannot be told from a config alone; "
            f"give a folder or a hub id with the safetensors files"
        )
    try:
        return found(config, rows, columns, scale)
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise SlebError(
            f"config.json's {QUANTISATION_KEYS[0]} is not that of {method} weights: "
            f"{type(error).__name__} {first_line(error)}; give a folder or a hub id with the "
            f"safetensors files"
        ) from error


def parameters_in(config: Config, name: str, dtype: str, numbers: int, stored: int) -> float:
    """Return the parameters in a stored tensor, which may be packed.

    Args:
        config: what config.json says of the quantisation.
        name: the tensor's name.
        dtype: its safetensors dtype.
        numbers: its number of elements.
        stored: its bytes.

    Raises:
        SlebError: it is packed in words, and the config does not give the number of bits.
    """
    leaf = name.rpartition(".")[2]
    if leaf in _BESIDE or leaf.endswith(_SCALES):
        return 0
    if dtype == "U8":
        return 2 * numbers  # two of four bits
    return stored * 8 / _bits(config) if dtype == "I32" else numbers


def _bits(config: Config) -> int:
    groups = config.get("config_groups")
    weights = [g.get("weights") for g in groups.values()] if isinstance(groups, Mapping) else []
    found = {g.get("num_bits") for g in weights if isinstance(g, Mapping)} | {config.get("bits")}
    bits = [number for number in found if isinstance(number, int) and number > 0]
    if len(bits) != 1:
        raise SlebError("config.json does not say in how many bits its weights are packed")
    return bits[0]


def is_left(name: str, config: Config) -> bool:
    """Return whether a module is unquantised: listed, in a listed one, or matched by ``re:…``."""
    for key in IGNORED:
        listed = config.get(key)
        for entry in map(str, listed if isinstance(listed, list) else ()):
            if entry.startswith("re:"):
                if re.match(entry[3:], name):
                    return True
            elif f".{entry}." in f".{name}.":
                return True
    return False


def _groups(config: Config, columns: int) -> int:
    size = config.get("group_size", 128)
    return math.ceil(columns / size) if isinstance(size, int) and size > 0 else 1


def _gptq(config: Config, rows: int, columns: int, scale: int) -> float:
    bits, groups = int(config["bits"]), _groups(config, columns)
    packed = rows * columns * bits / 8 + groups * rows * bits / 8
    return packed + groups * rows * scale + 4 * columns


def _awq(config: Config, rows: int, columns: int, scale: int) -> float:
    return _gptq(config, rows, columns, scale) - 4 * columns


def _fp8(config: Config, rows: int, columns: int, scale: int) -> float:
    del scale  # always float32
    block: Sequence[int] = config.get("weight_block_size") or (rows, columns)
    scales = math.ceil(rows / block[0]) * math.ceil(columns / block[1])
    activations = 4 * (config.get("activation_scheme") == "static")
    return rows * columns + 4 * scales + activations


def _compressed(config: Config, rows: int, columns: int, scale: int) -> float:
    groups = list((config.get("config_groups") or {}).values())
    if len(groups) != 1 or "Linear" not in groups[0].get("targets", ()):
        raise SlebError(
            "the size of weights in several formats cannot be told from config.json alone; give a "
            "folder or a hub id with the safetensors files"
        )
    weights, form = groups[0]["weights"], groups[0].get("format") or config.get("format")
    scales = _scales(weights, rows, columns)
    if form == "pack-quantized":
        # 32-bit words, and the original shape.
        bits = int(weights["num_bits"])
        packed = 4 * rows * math.ceil(columns * bits / 32) + 16
        points = 0 if weights.get("symmetric", True) else scales * bits / 8
        return packed + scales * scale + points
    if form in {"int-quantized", "float-quantized", "naive-quantized"}:
        return rows * columns + scales * scale
    raise SlebError(
        f"the size of compressed-tensors' {form} cannot be told from config.json alone; give a "
        f"folder or a hub id with the safetensors files"
    )


def _scales(weights: Config, rows: int, columns: int) -> int:
    """Return the number of scales of a matrix in compressed-tensors."""
    strategy = weights.get("strategy")
    if strategy == "block":
        block: Sequence[int] = weights["block_structure"]
        return math.ceil(rows / block[0]) * math.ceil(columns / block[1])
    if strategy == "group":
        return rows * _groups(weights, columns)
    return rows if strategy == "channel" else 1


def _mxfp4(config: Config, rows: int, columns: int, scale: int) -> float:
    del config, scale  # one exponent byte per 32 four-bit numbers
    return rows * columns / 2 + rows * columns / 32


_METHODS: Mapping[str, Callable[[Config, int, int, int], float]] = MappingProxyType(
    {
        "gptq": _gptq,
        "awq": _awq,
        "fp8": _fp8,
        "compressed-tensors": _compressed,
        "mxfp4": _mxfp4,
    }
)

EXPERTS_ONLY = frozenset(("mxfp4",))
"""Methods that quantise only experts."""
