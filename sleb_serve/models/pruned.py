"""Temporarily removes blocks from a Transformers model, to match the served model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from sleb_serve.checkpoint.decoder import COUNT_KEYS
from sleb_serve.cut.config import Cut
from sleb_serve.cut.layers import decoder_layers, decoder_of
from sleb_serve.cut.likeness import apply
from sleb_serve.errors import SlebError
from sleb_serve.manifest.repair_file import WeightChanges
from sleb_serve.manifest.tensors import kept_parts


@contextmanager
def blocks_deleted(
    model: Any, removed: Sequence[int], repair: WeightChanges | None = None
) -> Iterator[None]:
    """Remove blocks from `model` and apply the repair inside the context.

    Kept layers are renumbered and keep their attention type, the KV cache has one entry for each,
    and the config is the shorter model's.

    Args:
        model: a Transformers model with a decoder; restored to the dense model afterwards.
        removed: the blocks to remove.
        repair: changes to the kept blocks' weights.

    Raises:
        SlebError: the model cannot be pruned like this, or the repair does not match its weights.
    """
    layers = decoder_layers(model)
    whole, cut = list(layers), Cut(len(layers), tuple(sorted(removed)))
    with ExitStack() as stack:
        if repair is not None:
            _mend(whole, repair, stack)
        for name, parameter in model.named_parameters():
            weight = parameter.data
            kept = kept_parts(name, weight, cut)
            if kept is not weight:
                _set(parameter, "data", kept, stack)
        for place, index in enumerate(cut.kept):
            for module in whole[index].modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    _set(module, "layer_idx", place, stack)
        decoder = decoder_of(model.config)
        before = apply(model.config, cut)
        for name in sorted(before, key=lambda name: name not in COUNT_KEYS, reverse=True):
            stack.callback(setattr, decoder, name, before[name])
        _fill(layers, [whole[index] for index in cut.kept])
        stack.callback(_fill, layers, whole)
        yield


def _fill(layers: nn.ModuleList, content: Sequence[nn.Module]) -> None:
    """Replace the layers in the same list, so that all references see them."""
    layers._modules = {str(index): layer for index, layer in enumerate(content)}


def _set(target: Any, name: str, value: Any, stack: ExitStack) -> None:
    stack.callback(setattr, target, name, getattr(target, name))
    setattr(target, name, value)


def _mend(layers: Sequence[nn.Module], repair: WeightChanges, stack: ExitStack) -> None:
    for name in repair.names:
        # The checkpoint's name, which may have another prefix than Transformers'.
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal()), 0)
        index = int(parts[at]) if at else len(layers)
        own = dict(layers[index].named_parameters()) if index < len(layers) else {}
        parameter = own.get(".".join(parts[at + 1 :]))
        changed = None if parameter is None else repair(name, parameter.data)
        if parameter is None or changed is None or changed.shape != parameter.shape:
            raise SlebError(f"the repair is for {name}, which this model does not have as it is")
        weight = parameter.data
        stack.callback(weight.copy_, weight.clone())
        weight.copy_(changed)
