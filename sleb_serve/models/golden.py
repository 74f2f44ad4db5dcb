"""Golden log-probabilities of a manifest, for comparison with servers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sleb_serve.manifest.repair_file import WeightChanges
from sleb_serve.manifest.schema import Golden
from sleb_serve.models.pruned import blocks_deleted

GOLDEN_TOKENS = 64


@torch.inference_mode()
def golden(
    model: Any, tokens: Sequence[int], removed: Sequence[int], repair: WeightChanges
) -> Golden | None:
    """Compute the pruned model's log-probabilities of a text's first tokens.

    Args:
        model: the dense model; unchanged afterwards.
        tokens: the text.
        removed: the blocks to remove.
        repair: see `blocks_deleted`.

    Returns:
        None if a repaired model's weights are on disk, or the results are not finite.
    """
    if model.get_output_embeddings() is None:
        return None
    if repair.names and any(parameter.is_meta for parameter in model.parameters()):
        return None
    prompt = list(tokens[:GOLDEN_TOKENS])
    ids = torch.tensor([prompt], device=model.get_input_embeddings().weight.device)
    with blocks_deleted(model, removed, repair):
        logits = model(ids, use_cache=False).logits[0, :-1].float()
    scores = logits.log_softmax(-1).gather(1, ids[0, 1:, None].to(logits.device))[:, 0]
    if not bool(scores.isfinite().all()):
        return None
    return Golden(tuple(prompt), tuple(round(float(score), 4) for score in scores))
