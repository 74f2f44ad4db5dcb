"""A Transformers model's perplexity, most likely tokens and calibration on text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_BINS = 15


@dataclass(frozen=True)
class Reading:
    """A model's results on sequences of L tokens.

    Attributes:
        perplexity: exp of the mean of each sequence's mean loss over its L-1 predicted tokens.
        likeliest: the model's most likely token at each position.
        calibration_error: see `calibration_error`.
    """

    perplexity: float
    likeliest: Tensor
    calibration_error: float


@torch.inference_mode()
def read(model: Any, sequences: Sequence[Sequence[int]]) -> Reading:
    """Predict each token of sequences of L tokens except the first."""
    total, likeliest, sure, right = 0.0, [], [], []
    for sequence in sequences:
        ids = torch.tensor([list(sequence)], device=model.get_input_embeddings().weight.device)
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        wanted = ids[0, 1:].to(logits.device)
        total += float(nn.functional.cross_entropy(logits, wanted))
        best = logits.max(-1)
        likeliest.append(best.indices.cpu())
        sure.append((best.values - logits.logsumexp(-1)).exp().cpu())
        right.append((best.indices == wanted).cpu())
    mean = torch.tensor(total / len(sequences), dtype=torch.float64)
    error = calibration_error(torch.cat(sure), torch.cat(right))
    return Reading(float(mean.exp()), torch.cat(likeliest), error)


def calibration_error(sure: Tensor, right: Tensor) -> float:
    """Return the gap between a model's confidence and accuracy.

    The expected calibration error of Guo et al. (arXiv 1706.04599, section 3), in 15 bins.

    Args:
        sure: probability of the most likely token at each position, [N].
        right: whether this is the actual token, [N].
    """
    bins = (sure.double() * _BINS).long().clamp(max=_BINS - 1)
    gaps = torch.zeros(_BINS, dtype=torch.float64)
    gaps.index_add_(0, bins, right.double() - sure.double())
    return float(gaps.abs().sum()) / len(sure)


def perplexity(model: Any, sequences: Sequence[Sequence[int]]) -> float:
    """Return only the perplexity; see `Reading`."""
    return float(read(model, sequences).perplexity)
