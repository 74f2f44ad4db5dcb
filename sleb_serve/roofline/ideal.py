"""What removing blocks can gain at most, from the sizes of a model's parts."""

from __future__ import annotations

from sleb_serve.checkpoint.checkpoint import Checkpoint


def head_share(checkpoint: Checkpoint) -> float | None:
    """The head's share of the parameters that a generated token has to read, embeddings apart.

    None where the checkpoint does not say: PyTorch's own format, or sizes of other names.
    """
    counts = checkpoint.parameter_counts()
    config = checkpoint.decoder_config
    hidden, vocabulary = config.get("hidden_size", config.get("n_embd")), config.get("vocab_size")
    if counts is None or not isinstance(hidden, int) or not isinstance(vocabulary, int):
        return None
    head = hidden * vocabulary
    return head / (head + sum(counts[1]))


def ideal_ratio(num_blocks: int, removed: int, share: float) -> float:
    """Dense over pruned time if it goes to blocks and head alone: 1 / (1 - (1 - h) k / L).

    Args:
        num_blocks: L, of the dense model.
        removed: k.
        share: h, what is not in the blocks; 0 for prompts, of which only the last token meets the
            head.
    """
    return 1 / (1 - (1 - share) * removed / num_blocks)
