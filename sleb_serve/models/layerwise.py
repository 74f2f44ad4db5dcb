"""Layer-by-layer access to a Transformers causal LM: embedding, decoder layers, head.

The model's own forward runs with stand-ins for its decoder layers and head, so embeddings, masks,
rotary tables, the final norm and the logits' scaling are the model's own, for any family. Layers
and head can then run on any states, one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sleb_serve.cut.layers import decoder_layers

_PROBE_TOKENS = 16


@dataclass(frozen=True)
class Call:
    """Arguments of the model's call to one layer, except the states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool

    def __call__(self, layer: Callable[..., Any], states: Tensor) -> Any:
        """Run the layer on `states`."""
        if self.by_name:
            return layer(hidden_states=states, **self.kwargs)
        return layer(states, *self.args, **self.kwargs)


Answer = Callable[[int, Callable[..., Any], Tensor, Call], Tensor]
"""answer(index, layer, states, call): returns the output of layer `index`."""


class _StopForward(Exception):  # noqa: N818 - not an error
    """Stops the model's forward once it has given the needed values."""


class CausalLM:
    """A Transformers causal LM in eval mode; unchanged after each call.

    Args:
        model: in memory, dispatched over devices, or with its decoder layers on disk.
        tokens: a few token ids for a test run.
    """

    def __init__(self, model: nn.Module, tokens: Sequence[int]) -> None:
        self.model = model
        self.layers = decoder_layers(model)
        self.head: Any = model.get_output_embeddings()
        embedding: Tensor = model.get_input_embeddings().weight
        self.device = embedding.device
        self.dtype = embedding.dtype
        self._lengths: dict[type, int | None] = {}
        self.batches = True
        self._probe_layers(self._ids(tokens[:_PROBE_TOKENS]))
        self._identity = False
        self.row_wise = self._probe_head()
        self.separable = self._probe_separable(tokens[:_PROBE_TOKENS])

    @property
    def vocabulary(self) -> int:
        """Return the number of rows of the head, one per logit."""
        return int(self.head.weight.shape[0])

    @torch.inference_mode()
    def begin(self, tokens: Sequence[int]) -> tuple[Tensor, list[Call]]:
        """Return the first layer's input, shape [1, L, d], and each layer's call."""
        calls: list[Call] = []
        first: list[Tensor] = []

        def capture(index: int, layer: Any, states: Tensor, call: Call) -> Tensor:
            calls.append(call)
            first.append(states)
            if index == len(self.layers) - 1:
                raise _StopForward
            return states

        self._forward(self._ids(tokens), capture)
        return first[0], calls

    @contextmanager
    def loaded(self, index: int) -> Iterator[Callable[..., Any]]:
        """Provide layer `index` with its weights in memory, read from disk once if needed.

        accelerate's hooks would read them at every call.
        """
        layer = self.layers[index]
        offloaded = [
            module
            for module in layer.modules()
            if getattr(getattr(module, "_hf_hook", None), "offload", False)
        ]
        forwards = [module.forward for module in offloaded]
        try:
            for module in offloaded:
                hook: Any = module._hf_hook
                hook.pre_forward(module)
                module.forward = module._old_forward
            yield layer.forward
        finally:
            for module, forward in zip(offloaded, forwards, strict=True):
                module.forward = forward
                hook = module._hf_hook
                hook.post_forward(module, None)

    @torch.inference_mode()
    def run(self, layer: Callable[..., Any], states: Sequence[Tensor], call: Call) -> list[Tensor]:
        """Run one layer on states of shape [1, L, d], in one batch if it supports that."""
        if not self.batches and len(states) > 1:
            return [moved for state in states for moved in self.run(layer, [state], call)]
        # Copy even a single state, because a layer may modify its input.
        answer = _tensor(call(layer, torch.cat(list(states))))
        return list(answer.split(1)) if len(answer) > 1 else [answer]

    @torch.inference_mode()
    def normed(self, state: Tensor) -> Tensor:
        """Return the head's input [T, h] for a state [1, T, d] after the last layer."""
        found: list[Tensor] = []

        def capture(inputs: Tensor) -> Tensor:
            found.append(inputs)
            raise _StopForward

        ids = torch.zeros(state.shape[:2], dtype=torch.long, device=self.device)
        with self._head_answers(capture):
            self._forward(ids, lambda *_: state)
        return found[0][0]

    @torch.inference_mode()
    def logits(self, normed: Tensor, rows: tuple[Tensor, Tensor | None] | None) -> Tensor:
        """Return logits [T, R] of head inputs [T, h], for the rows from `head_rows`."""
        if rows is None:
            raw: Tensor = self.head(normed[None])
        else:
            weight, bias = rows
            raw = nn.functional.linear(normed.to(weight.device), weight, bias)[None]
        return (raw if self._identity else self._finish(raw))[0]

    def head_rows(self, rows: Tensor | slice) -> tuple[Tensor, Tensor | None]:
        """Return the head's weight and bias for some rows of the vocabulary."""
        bias: Tensor | None = self.head.bias
        return self.head.weight[rows], None if bias is None else bias[rows]

    def _finish(self, raw: Tensor) -> Tensor:
        """Apply the model's cap or scale, if any, to the head's output [1, T, R]."""
        ids = torch.zeros((1, 1), dtype=torch.long, device=self.device)
        with self._head_answers(lambda inputs: raw):
            result: Tensor = self._forward(ids, lambda index, layer, states, call: states).logits
        return result

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([tokens], dtype=torch.long, device=self.device)

    def _forward(self, ids: Tensor, answer: Answer) -> Any:
        """Run the model's forward with `answer` replacing the decoder layers; None if stopped."""
        with self._layers_answer(answer):
            try:
                return self.model(input_ids=ids, use_cache=False)
            except _StopForward:
                return None

    @contextmanager
    def _layers_answer(self, answer: Answer) -> Iterator[None]:
        # accelerate's hooks may already have set an instance's forward.
        before = [layer.__dict__.get("forward") for layer in self.layers]

        def stand_in(index: int, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if args:
                states, call = args[0], Call(args[1:], kwargs, by_name=False)
            else:
                states = kwargs.pop("hidden_states")
                call = Call((), kwargs, by_name=True)
            result = answer(index, layer, states, call).to(states.device)
            length = self._lengths.get(type(self.layers[index]))
            return result if length is None else (result, *(None,) * (length - 1))

        try:
            for index, layer in enumerate(self.layers):
                layer.forward = partial(stand_in, index, layer.forward)
            yield
        finally:
            for layer, own in zip(self.layers, before, strict=True):
                _restore(layer, own)

    @contextmanager
    def _head_answers(self, answer: Callable[[Tensor], Tensor]) -> Iterator[None]:
        own = self.head.__dict__.get("forward")
        try:
            self.head.forward = answer
            yield
        finally:
            _restore(self.head, own)

    @torch.inference_mode()
    def _probe_layers(self, ids: Tensor) -> None:
        """Test the return type and batch support of one layer of each class.

        A layer supports batches if two copies of a state with a single mask give two equal outputs.
        """

        def learn(index: int, layer: Any, states: Tensor, call: Call) -> Tensor:
            kind = type(self.layers[index])
            if kind in self._lengths:
                return states
            with self.loaded(index):
                result = call(layer, states.clone())
                self._lengths[kind] = len(result) if isinstance(result, tuple) else None
                one = _tensor(result)
                try:
                    two = _tensor(call(layer, states.repeat(2, 1, 1)))
                    tolerance = 1e-4 if one.dtype == torch.float32 else 0.05
                    scale = float(one.abs().max())
                    self.batches &= two.shape[0] == 2 and bool(
                        ((two - one).abs().max() <= tolerance * scale).item()
                    )
                except (RuntimeError, ValueError, IndexError):
                    self.batches = False
            return one

        self._forward(ids, learn)

    @torch.inference_mode()
    def _probe_separable(self, tokens: Sequence[int]) -> bool:
        """Return whether the layers, run one by one, give the model's result.

        They do not if a layer uses more than the previous layer's output.
        """
        expected: Tensor = self._forward(
            self._ids(tokens), lambda index, layer, states, call: _tensor(call(layer, states))
        ).logits[0]
        state, calls = self.begin(tokens)
        for index, call in enumerate(calls):
            with self.loaded(index) as layer:
                (state,) = self.run(layer, [state], call)
        found = self.logits(self.normed(state), None)
        tolerance = 1e-3 if found.dtype == torch.float32 else 0.1
        scale = float(expected.abs().max())
        return bool(((found - expected).abs().max() <= tolerance * scale).item())

    @torch.inference_mode()
    def _probe_head(self) -> bool:
        """Return whether logits depend only on their own row of the head, and are final."""
        if not isinstance(self.head, nn.Linear) or not self.head.weight.is_floating_point():
            return False
        generator = torch.Generator().manual_seed(0)
        raw = torch.randn((1, 2, self.vocabulary), generator=generator) * 20
        raw = raw.to(self.head.weight.device, self.dtype)
        whole = self._finish(raw.clone())
        if whole.shape != raw.shape:
            return False
        self._identity = torch.equal(whole, raw)
        part = slice(0, self.vocabulary, 3)
        return bool(torch.equal(self._finish(raw[..., part].clone()), whole[..., part]))


def _restore(module: nn.Module, forward: Any) -> None:
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.forward = forward


def _tensor(result: Any) -> Tensor:
    tensor: Tensor = result[0] if isinstance(result, tuple) else result
    return tensor


def same(one: object, two: object) -> bool:
    """Return whether two layers' calls, or their values, are equal."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one is two or (one.shape == two.shape and torch.equal(one, two))
    if isinstance(one, Call) and isinstance(two, Call):
        return same([one.args, one.kwargs], [two.args, two.kwargs])
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one is two or one == two)
