"""The perplexity of a Transformers model, and the tokens that it finds the likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


@torch.inference_mode()
def judged(model: Any, sequences: Sequence[Sequence[int]]) -> tuple[float, Tensor]:
    """Judge a model on sequences of L tokens.

    Returns:
        The perplexity: exp of the mean of each sequence's mean loss over its L-1 predicted tokens;
        and at each of their places the token that the model finds the likeliest.
    """
    total, likeliest = 0.0, []
    for sequence in sequences:
        ids = torch.tensor([list(sequence)], device=model.get_input_embeddings().weight.device)
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits, ids[0, 1:].to(logits.device)))
        likeliest.append(logits.argmax(-1).cpu())
    mean = torch.tensor(total / len(sequences), dtype=torch.float64)
    return float(mean.exp()), torch.cat(likeliest)


def perplexity(model: Any, sequences: Sequence[Sequence[int]]) -> float:
    """The perplexity alone: see `judged`."""
    value, _ = judged(model, sequences)
    return float(value)
