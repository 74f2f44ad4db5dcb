"""Locations of the decoder layers in a Transformers config and model."""

from __future__ import annotations

import copy
from typing import Any

from sleb_serve.checkpoint.decoder import decoder_path
from sleb_serve.errors import SlebError


def decoder_of(config: Any) -> Any:
    """Return the decoder's part of a Transformers config: itself, or a nested config."""
    path = decoder_path(config.to_dict())
    for key in path or ():
        config = getattr(config, key)
    return config


def decoder_layers(model: Any) -> Any:
    """Return the list of decoder layers; see `layers_path`."""
    return model.get_submodule(layers_path(model))


def layers_path(model: Any) -> str:
    """Find the list of decoder layers: the outermost list as long as the config's layer count.

    Raises:
        SlebError: there is none, or more than one.
    """
    from torch import nn

    count = decoder_of(model.config).num_hidden_layers
    decoder = getattr(model, "get_decoder", lambda: None)() or model
    inside = {id(module) for module in decoder.modules()}
    lists: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer, _ in lists)
        if isinstance(module, nn.ModuleList) and len(module) == count and not nested:
            lists.append((name, module))
    for found in ([(n, m) for n, m in lists if id(m) in inside], lists):
        if len(found) == 1:
            return found[0][0]
    names = ", ".join(name for name, _ in found) or "none"
    raise SlebError(
        f"{type(model).__name__}: found {len(found)} lists of {count} layers ({names}) where a "
        f"decoder has one; this architecture cannot be pruned"
    )


def meta_model(kind: Any, config: Any) -> Any:
    """Build an unquantised model on the meta device.

    Args:
        kind: its Transformers class.
        config: its Transformers config, which is not modified.
    """
    import torch

    config = copy.deepcopy(config)
    for part in {id(c): c for c in (config, decoder_of(config))}.values():
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    with torch.device("meta"):
        return kind(config)
