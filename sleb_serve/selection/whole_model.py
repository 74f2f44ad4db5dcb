"""Losses by whole passes of the model with blocks deleted: the official method, slow but general.

For models with layers that cannot run one by one because they share keys and values, and for
pooling models, which predict nothing and are compared with the dense model's hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sleb_serve.cut.layers import decoder_layers
from sleb_serve.models.pruned import blocks_deleted
from sleb_serve.selection.search import Scores

EMBEDDING = "embedding"
"""The objective of pooling models."""


class WholeModel:
    """Scores candidates like `layer_sweep.LayerSweep`, with one pass per candidate and sequence.

    Args:
        model: a Transformers model, in memory.
        sequences: this process's sequences of token ids.
        gather: collects the per-sequence values of all processes from those of this one.
        objective: ``nll`` or ``kl``, see `LayerSweep`; or ``embedding``: one minus the cosine of
            the last hidden states with the dense model's, averaged over tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        sequences: Sequence[Sequence[int]],
        *,
        gather: Callable[[list[Any]], list[Any]] = lambda values: values,
        objective: str = "nll",
    ) -> None:
        self.whole = model
        self.layers = decoder_layers(model)
        self._gather, self._objective = gather, objective
        weight = next(model.parameters())
        self.dtype = weight.dtype
        self._sequences = [
            torch.tensor([list(sequence)], device=weight.device) for sequence in sequences
        ]
        self._dense: list[Tensor] = []

    def score(
        self,
        removed: Sequence[int],
        candidates: Sequence[int],
        *,
        on_layer: Callable[[], None] = lambda: None,
        **_: Any,
    ) -> Scores:
        """Return the exact losses without `removed` and each of `candidates`."""
        base = self.loss(removed)
        losses = []
        for block in candidates:
            losses.append(self.loss([*removed, block]))
            for _window in self._sequences:
                on_layer()
        return Scores(tuple(losses), (True,) * len(losses), base)

    def loss(self, removed: Sequence[int]) -> float:
        """Return the mean loss over all processes' sequences without `removed`."""
        if self._objective != "nll" and not self._dense:
            self._dense = [self._answer(sequence) for sequence in self._sequences]
        if not removed:
            return self._mean()
        with blocks_deleted(self.whole, removed):
            return self._mean()

    def layer_count(self, removed: Sequence[int]) -> int:
        """Return how often `score` calls `on_layer` if all blocks are candidates."""
        return len(self._sequences) * (len(self.layers) - len(removed))

    def _mean(self) -> float:
        own = [self._loss(number) for number in range(len(self._sequences))]
        every = self._gather(own)
        return float(sum(every) / len(every))

    @torch.inference_mode()
    def _answer(self, sequence: Tensor) -> Tensor:
        """Return log-probabilities [L - 1, V] or hidden states [L, d]."""
        if self._objective == EMBEDDING:
            base: Any = getattr(self.whole, "base_model", self.whole)
            states: Tensor = base(input_ids=sequence).last_hidden_state[0].float()
            return states
        logits = self.whole(input_ids=sequence, use_cache=False).logits[0, :-1].float()
        return logits.log_softmax(-1)

    @torch.inference_mode()
    def _loss(self, number: int) -> float:
        sequence, answer = self._sequences[number], self._answer(self._sequences[number])
        if self._objective == "nll":
            loss = nn.functional.nll_loss(answer, sequence[0, 1:].to(answer.device))
        elif self._objective == EMBEDDING:
            loss = (1 - nn.functional.cosine_similarity(self._dense[number], answer, dim=-1)).mean()
        else:
            dense = self._dense[number]
            loss = nn.functional.kl_div(answer, dense, reduction="batchmean", log_target=True)
        return float(loss.item())
