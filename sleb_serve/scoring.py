"""The loss of a causal LM with blocks skipped: the layer sweep.

All candidates of a greedy step share the layers before their block. The sweep runs the layers once
and carries one growing batch: the base state, and for each candidate met so far the state that
skipped it. Half the block work of one pass per candidate, the same losses.

It works from inside the model's own forward, by standing in for each decoder layer's ``forward``:
embeddings, masks, rotary tables, final norm and head stay the model's own, whatever its family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sleb_serve.checkpoint import Checkpoint
from sleb_serve.errors import SlebError, first_line

_LOGITS_BYTES = 256 << 20
"""Logits held at a time, in the model's dtype."""
_LOSS_TOKENS = 128
"""Rows of logits turned into float32 at a time."""
_PROBE_TOKENS = 16


def check_causal_lm(checkpoint: Checkpoint) -> None:
    """Refuse a model that Transformers does not know as a causal LM.

    Raises:
        SlebError: naming the architecture.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known: set[str] = set()
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        known.update([names] if isinstance(names, str) else names)
    if checkpoint.architecture not in known or checkpoint.config.get("is_encoder_decoder"):
        raise SlebError(
            f"{checkpoint.path} is not a causal language model that Transformers knows: its "
            f"architecture is {checkpoint.architecture}; give a decoder-only text model"
        )


def load_model(checkpoint: Checkpoint, dtype: str) -> nn.Module:
    """Load a checkpoint's causal LM for scoring, spread over the accelerators where there are any.

    Args:
        checkpoint: a folder with config and weights.
        dtype: a torch dtype by name, or ``auto`` for the checkpoint's own.

    Raises:
        SlebError: weights are missing or cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    checkpoint.weight_files()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(checkpoint.path),
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            device_map="auto" if torch.accelerator.is_available() else None,
        )
    except Exception as error:
        raise SlebError(
            f"cannot load {checkpoint.path}: {first_line(error)}; check that the checkpoint is "
            f"whole and that this Transformers knows it"
        ) from error
    result: nn.Module = model.eval()
    return result


def model_dtype(model: nn.Module) -> str:
    """The dtype that the model computes in, by its torch name without the prefix."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers: the outermost ModuleList as long as the config's layer count.

    Raises:
        SlebError: there is none, or more than one.
    """
    count = model.config.get_text_config().num_hidden_layers
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and len(module) == count and not nested:
            found.append((name, module))
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise SlebError(
            f"{type(model).__name__}: found {len(found)} lists of {count} layers ({names}) where a "
            f"decoder has one; this architecture is not supported by the selector"
        )
    return found[0][1]


class LayerSweep:
    """Losses of a causal LM with blocks skipped, over windows of tokens.

    Args:
        model: a Transformers causal LM in eval mode; it is left as it was after each call.
        windows: token ids, all windows of the same length.
    """

    def __init__(self, model: nn.Module, windows: Sequence[Sequence[int]]) -> None:
        self.model = model
        self.layers = decoder_layers(model)
        device = model.get_input_embeddings().weight.device
        self.windows = torch.tensor(windows, dtype=torch.long, device=device)
        if int(self.windows.max()) >= model.config.get_text_config().vocab_size:
            raise SlebError(
                "the tokenizer makes token ids beyond the model's vocabulary; the tokenizer files "
                "are not this model's"
            )
        self._result_lengths, self._batches = self._probe()

    def score(
        self,
        removed: Sequence[int],
        candidates: Sequence[int],
        *,
        base: bool = False,
        on_window: Callable[[], None] = lambda: None,
    ) -> list[float]:
        """Mean nats per predicted token with `removed` and each of `candidates` in turn skipped.

        The official score is the sum over windows of the mean cross-entropy of the L-1 predicted
        tokens, times L (sleb.py of the official code); this is that sum over all windows' tokens.

        Args:
            removed: blocks that are gone.
            candidates: blocks to try, ascending, none of them in `removed`.
            base: also score `removed` alone; its loss comes first.
            on_window: called after each window.

        Returns:
            One loss per candidate, after the base's if that was asked for.
        """
        totals: list[list[float]] = []
        for window in self.windows:
            totals.append(self._window_losses(window.unsqueeze(0), removed, candidates, base))
            on_window()
        return [math.fsum(losses) / len(totals) for losses in zip(*totals, strict=True)]

    @torch.inference_mode()
    def _window_losses(
        self, tokens: Tensor, removed: Sequence[int], candidates: Sequence[int], base: bool
    ) -> list[float]:
        """Losses of one window, shape [1, L], in the order of `score`'s."""
        gone, forks = frozenset(removed), frozenset(candidates)
        last_fork = max(candidates, default=-1)
        last_layer = len(self.layers) - 1
        states: Tensor | None = None

        def sweep(index: int, layer: Callable[..., Any], hidden: Tensor, call: Call) -> Tensor:
            nonlocal states
            if index not in gone:
                forked = hidden[:1] if index in forks else None
                if index == last_fork and not base:
                    hidden = hidden[1:]  # the base was carried for the forks alone
                hidden = self._run(layer, hidden, call)
                if forked is not None:
                    hidden = torch.cat([hidden, forked.to(hidden.device)])
            if index == last_layer:
                states = hidden
                return hidden[:1]
            return hidden

        losses = self._losses(tokens, sweep)
        assert states is not None
        per_state = tokens.shape[1] * self._vocabulary * states.element_size()
        for rest in states[1:].split(max(1, _LOGITS_BYTES // per_state)):
            losses += self._losses(tokens.expand(len(rest), -1), _resume_from(rest))
        return losses

    @property
    def _vocabulary(self) -> int:
        size: int = self.model.config.get_text_config().vocab_size
        return size

    def _losses(self, tokens: Tensor, stand_in: StandIn) -> list[float]:
        """Run the model's forward on [B, L] tokens; per row, the mean loss of the L-1 predicted."""
        with self._standing_in(stand_in):
            logits = self.model(input_ids=tokens, use_cache=False).logits
        targets = tokens[:, 1:].to(logits.device)
        losses = []
        for row, target in zip(logits, targets, strict=True):
            nats = [
                nn.functional.cross_entropy(part.float(), wanted, reduction="sum").double()
                for part, wanted in zip(
                    row[:-1].split(_LOSS_TOKENS), target.split(_LOSS_TOKENS), strict=True
                )
            ]
            losses.append(float(torch.stack(nats).sum()) / len(target))
        return losses

    def _run(self, layer: Callable[..., Any], hidden: Tensor, call: Call) -> Tensor:
        """One layer on [B, L, d] states, as one batch where the layer's other inputs allow it."""
        if len(hidden) == 0:
            return hidden
        if self._batches:
            return _tensor(call(layer, hidden))
        return torch.cat([_tensor(call(layer, state)) for state in hidden.split(1)])

    @contextmanager
    def _standing_in(self, stand_in: StandIn) -> Iterator[None]:
        """Let `stand_in` answer for every decoder layer's forward, in the shape it answers in."""
        # A forward may be the instance's own already: accelerate's hooks put theirs there.
        before = [layer.__dict__.get("forward") for layer in self.layers]

        def answer(
            index: int, layer: Callable[..., Any], *args: Any, **kwargs: Any
        ) -> Tensor | tuple[Tensor | None, ...]:
            hidden, call = _split_call(args, kwargs)
            result = stand_in(index, layer, hidden, call)
            length = self._result_lengths[index]
            return result if length is None else (result, *(None,) * (length - 1))

        try:
            for index, layer in enumerate(self.layers):
                layer.forward = partial(answer, index, layer.forward)
            yield
        finally:
            for layer, own in zip(self.layers, before, strict=True):
                if own is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.forward = own

    @torch.inference_mode()
    def _probe(self) -> tuple[list[int | None], bool]:
        """Learn, on a few tokens, what each layer returns and whether it takes a larger batch.

        Returns:
            For each layer, the length of the tuple it returns (None for a bare tensor); and whether
            every layer, given two copies of a state with the masks of one, answers two of one.
        """
        self._result_lengths = [None] * len(self.layers)
        lengths: list[int | None] = [None] * len(self.layers)
        batches = True

        def learn(index: int, layer: Callable[..., Any], hidden: Tensor, call: Call) -> Tensor:
            nonlocal batches
            result = call(layer, hidden)
            one = _tensor(result)
            lengths[index] = len(result) if isinstance(result, tuple) else None
            self._result_lengths[index] = lengths[index]
            try:
                two = _tensor(call(layer, hidden.repeat(2, 1, 1)))
                tolerance = 1e-4 if one.dtype == torch.float32 else 0.05
                scale = float(one.abs().max())
                batches &= two.shape[0] == 2 and bool(
                    ((two - one).abs().max() <= tolerance * scale).item()
                )
            except (RuntimeError, ValueError, IndexError):
                batches = False
            return one

        with self._standing_in(learn):
            self.model(input_ids=self.windows[:1, :_PROBE_TOKENS], use_cache=False)
        return lengths, batches


Call = Callable[[Callable[..., Any], Tensor], Any]
"""call(layer, states): the layer on these states, its other arguments as the model gave them."""
StandIn = Callable[[int, Callable[..., Any], Tensor, Call], Tensor]
"""stand_in(index, layer, states, call): what to answer for layer `index` instead of running it."""


def _split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """Tell the states from a layer's other arguments; they come first, or by name."""
    if args:
        return args[0], lambda layer, states: layer(states, *args[1:], **kwargs)
    others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return kwargs["hidden_states"], lambda layer, states: layer(hidden_states=states, **others)


def _tensor(result: Any) -> Tensor:
    tensor: Tensor = result[0] if isinstance(result, tuple) else result
    return tensor


def _resume_from(states: Tensor) -> StandIn:
    """A stand-in that runs no layer and hands `states`, what the last layer gave, to the norm."""

    def skip(index: int, layer: Callable[..., Any], hidden: Tensor, call: Call) -> Tensor:
        return states.to(hidden.device)

    return skip
