"""Pruning in vLLM's Transformers modelling backend, which builds layers without `make_layers`.

The backend makes Transformers' own model without weights, takes away what other pipeline stages
hold, and then swaps in vLLM's modules. Removed layers are taken away in between, like those of
another stage.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.model_executor.models.utils import PPMissingLayer

from sleb_serve.errors import SlebError
from sleb_vllm.layers import BuiltLayers, RemovedLayer, removing


def is_backend(stock: Any) -> bool:
    """Whether a vLLM model class is one of the backend's."""
    return hasattr(stock, "pipeline_parallel") and hasattr(stock, "_create_attention_instances")


class PrunedBackend:
    """The methods of the backend in which a pruned model differs; for use before its class."""

    def pipeline_parallel(self) -> None:
        """Take away the layers of other stages, then the removed ones."""
        super().pipeline_parallel()  # type: ignore[misc]
        removal = removing()
        holder, name, layers = _decoder(self.model, removal.pruning.num_blocks)  # type: ignore[attr-defined]
        own = [i for i, layer in enumerate(layers) if not isinstance(layer, PPMissingLayer)]
        for index in set(own).intersection(removal.pruning.removed):
            layers[index] = RemovedLayer()
        built = BuiltLayers(f"model.{name}", own[0], own[-1] + 1, layers)
        removal.finish(type(holder), built)

    def _create_hf_to_vllm_mapper(self) -> None:
        # Weights that Transformers renames are looked up by the architecture's own name.
        config = self.config  # type: ignore[attr-defined]
        asked_for = config.architectures
        config.architectures = [removing().pruning.architecture]
        try:
            super()._create_hf_to_vllm_mapper()  # type: ignore[misc]
        finally:
            config.architectures = asked_for

    def _create_attention_instances(self, *args: Any, **kwargs: Any) -> None:
        # The stock method wants every layer of its range to be there: one range per kept layer.
        removal = removing()
        for index in removal.result.kept():
            with removal.one_layer(index):
                super()._create_attention_instances(*args, **kwargs)  # type: ignore[misc]


def _decoder(model: nn.Module, count: int) -> tuple[nn.Module, str, nn.ModuleList]:
    """The module that holds the decoder's layers, their name from `model` on, and the list."""
    found = [
        (holder, f"{path}.{name}" if path else name, child)
        for path, holder in model.named_modules()
        for name, child in holder.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    if len(found) != 1:
        raise SlebError(
            f"{type(model).__name__} has {len(found)} lists of {count} layers, where exactly one "
            f"can be pruned"
        )
    return found[0]
