"""Ideal gain from removing blocks, from the sizes of a model's parts."""

from __future__ import annotations

from sleb_serve.checkpoint.checkpoint import Checkpoint


def head_share(checkpoint: Checkpoint) -> float | None:
    """Return the head's share of the parameters that a generated token reads, without embeddings.

    None if unknown: a checkpoint in PyTorch's own format, or sizes with other names.
    """
    counts = checkpoint.parameter_counts()
    config = checkpoint.decoder_config
    hidden, vocabulary = config.get("hidden_size", config.get("n_embd")), config.get("vocab_size")
    if counts is None or not isinstance(hidden, int) or not isinstance(vocabulary, int):
        return None
    head = hidden * vocabulary
    return head / (head + sum(counts[1]))


def ideal_ratio(num_blocks: int, removed: int, share: float) -> float:
    """Return the ratio if only blocks and head took time: 1 / (1 - (1 - h) k / L).

    Args:
        num_blocks: L, the dense model's blocks.
        removed: k, the removed blocks.
        share: h, the share outside the blocks; 0 for prompts, where only the last token goes
            through the head.
    """
    return 1 / (1 - (1 - share) * removed / num_blocks)
