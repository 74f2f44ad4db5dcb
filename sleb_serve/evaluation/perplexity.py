"""The perplexity of a Transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


@torch.inference_mode()
def perplexity(model: Any, sequences: Sequence[Sequence[int]]) -> float:
    """Of sequences [L]: exp of the mean of each one's mean loss over its L-1 predicted tokens."""
    total = 0.0
    for sequence in sequences:
        ids = torch.tensor([list(sequence)], device=model.get_input_embeddings().weight.device)
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits, ids[0, 1:].to(logits.device)))
    return float(torch.tensor(total / len(sequences), dtype=torch.float64).exp())
