"""Placeholders for removed decoder layers, put in place while vLLM builds a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm import envs
from vllm.distributed import utils as distributed
from vllm.model_executor.models import utils
from vllm.model_executor.models.utils import PPMissingLayer

from sleb_serve.errors import SlebError
from sleb_serve.pruning import MAP_EPSILON, Pruning
from sleb_vllm.loops import Carried, carried_by
from sleb_vllm.patching import replaced


class RemovedLayer(PPMissingLayer):
    """Stands where a removed decoder layer would be and hands on what it was given.

    vLLM's weight loaders, LoRA and others take a `PPMissingLayer` for absent, so the layers that
    remain keep their indices, and with them their weights' names, their attention type and window.
    """

    carried: tuple[Carried, ...] = ()
    repair: torch.Tensor | None

    def __init__(self) -> None:
        super().__init__()
        # Not a parameter: those must come from the checkpoint.
        self.register_buffer("repair", None, persistent=False)

    def stand_for(self, carried: tuple[Carried, ...], sibling: nn.Module) -> None:
        """Take on what the model's loop carries, and a kept layer's plain attributes.

        Some loops read a layer's flags (its attention type, say) to choose what to pass it.
        """
        self.carried = carried
        for name, value in vars(sibling).items():
            if isinstance(value, bool | int | float | str) and not hasattr(self, name):
                setattr(self, name, value)

    def mend(self, shape: tuple[int, ...]) -> None:
        """Make room for what repairs the gap that begins here: a map [d, d] or a scale [1]."""
        self.repair = torch.zeros(shape)  # repairs nothing until it is loaded

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The inputs that the model's loop carries from layer to layer, in the order it wants.

        A map R adds norm(x) R to the stream x, a scale x R. A loop that carries a residual has the
        stream in two parts, and all that the next layer reads is their sum.
        """
        values = [value.of(args, kwargs) for value in self.carried]
        if self.repair is not None:
            stream = values[0]
            if len(values) > 1 and values[1] is not None:
                stream = stream + values[1]
            if self.repair.ndim == 2:
                unit = nn.functional.rms_norm(stream, stream.shape[-1:], eps=MAP_EPSILON)
                change = unit @ self.repair
            else:
                change = stream * self.repair
            values[0] = values[0] + change
        return values[0] if len(values) == 1 else tuple(values)


@dataclass(frozen=True)
class BuiltLayers:
    """The decoder that was built: its layers, where they stand, which part is this rank's."""

    prefix: str
    start: int
    end: int
    layers: nn.ModuleList

    def kept(self) -> list[int]:
        """Original indices of the layers that exist on this rank."""
        return [i for i, layer in enumerate(self.layers) if not isinstance(layer, PPMissingLayer)]


class Removal:
    """The removal under way while one model is built."""

    def __init__(
        self, pruning: Pruning, hidden_size: int, divide: Callable[..., tuple[int, int]]
    ) -> None:
        self.pruning = pruning
        self.hidden_size = hidden_size
        self._divide = divide
        self._made: list[BuiltLayers] = []
        self._only: int | None = None

    @contextmanager
    def one_layer(self, index: int) -> Iterator[None]:
        """While this is open, vLLM takes this rank's part of the decoder to be layer `index`."""
        self._only = index
        try:
            yield
        finally:
            self._only = None

    def stage(self, rank: int, size: int) -> tuple[int, int]:
        """Layers ``start <= i < end``, by original index, of stage `rank` of `size`.

        As vLLM would divide a model of the kept layers only, so that stages take equally long;
        ``VLLM_PP_LAYER_PARTITION``, which counts original layers, is followed where it is set.

        Raises:
            SlebError: there are more stages than kept layers.
        """
        count = self.pruning.num_blocks
        if self._only is not None:
            return self._only, self._only + 1
        if envs.VLLM_PP_LAYER_PARTITION is not None:
            return self._divide(count, rank, size)
        kept = [i for i in range(count) if i not in self.pruning.removed]
        if len(kept) < size:
            raise SlebError(
                f"{len(kept)} kept layers cannot fill {size} pipeline stages; remove fewer blocks "
                f"or use --tensor-parallel-size"
            )
        start, end = self._divide(len(kept), rank, size)
        return kept[start] if rank else 0, kept[end] if rank + 1 < size else count

    def finish(self, decoder: type, built: BuiltLayers) -> None:
        """Make the placeholders among `decoder`'s layers answer as its loop expects.

        Raises:
            SlebError: no layer is kept, or the loop is of no known form.
        """
        kept = built.kept()
        if not kept:
            raise SlebError(
                f"every layer of {built.prefix} on this rank is removed; remove fewer blocks"
            )
        sibling = built.layers[kept[0]]
        carried = carried_by(decoder, type(sibling))
        repair = self.pruning.repair
        firsts = {first for first, _ in self.pruning.gaps}
        for index, layer in enumerate(built.layers):
            if isinstance(layer, RemovedLayer):
                layer.stand_for(carried, sibling)
                if repair is not None and repair.kind != "fold" and index in firsts:
                    width = self.hidden_size
                    layer.mend((width, width) if repair.kind == "map" else (1,))
        self._made.append(built)

    @property
    def result(self) -> BuiltLayers:
        """The one decoder that was built.

        Raises:
            SlebError: none was, or several were, and then which one is pruned cannot be told.
        """
        if len(self._made) != 1:
            raise SlebError(
                f"{self.pruning.architecture} made {len(self._made)} lists of "
                f"{self.pruning.num_blocks} decoder layers where exactly one can be pruned; this "
                f"vLLM cannot serve it pruned"
            )
        return self._made[0]


_current: ContextVar[Removal] = ContextVar("removal")


def removing() -> Removal:
    """The removal under way in this thread."""
    return _current.get()


@contextmanager
def layers_removed(pruning: Pruning, hidden_size: int) -> Iterator[Removal]:
    """While this is open, vLLM's `make_layers` leaves out the removed layers of one decoder.

    Other models of the process never see this one.

    Yields:
        Its `result` is the decoder, once that has been made.
    """
    original = utils.make_layers
    divide: Callable[..., tuple[int, int]] = distributed.get_pp_indices
    removal = Removal(pruning, hidden_size, divide)

    def make_layers(num_hidden_layers: int, layer_fn: Callable[..., Any], prefix: str) -> Any:
        if num_hidden_layers != pruning.num_blocks:
            return original(num_hidden_layers, layer_fn, prefix)
        removed = frozenset(pruning.removed)

        def make_layer(prefix: str) -> Any:
            index = int(prefix.rpartition(".")[2])
            return RemovedLayer() if index in removed else layer_fn(prefix=prefix)

        start, end, layers = original(num_hidden_layers, make_layer, prefix)
        # The caller is the decoder's own __init__.
        decoder = type(sys._getframe(1).f_locals["self"])
        removal.finish(decoder, BuiltLayers(prefix, start, end, layers))
        return start, end, layers

    def stage_of(num_hidden_layers: int, pp_rank: int, pp_size: int) -> tuple[int, int]:
        if num_hidden_layers != pruning.num_blocks:
            return divide(num_hidden_layers, pp_rank, pp_size)
        return removal.stage(pp_rank, pp_size)

    token = _current.set(removal)
    try:
        with (
            replaced("make_layers", original, make_layers),
            replaced("get_pp_indices", divide, stage_of),
        ):
            yield removal
    finally:
        _current.reset(token)
