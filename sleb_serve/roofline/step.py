"""Roofline time of one forward pass, from a model's sizes and a device's peaks.

In each block, a step takes as long as its arithmetic or its memory traffic, whichever is longer,
plus two all-reduces with tensor parallelism. These are lower bounds: kernels reach only part of the
peak, modelled by efficiencies below 1. Ratios of pruned over dense hardly depend on them.
"""

from __future__ import annotations

from dataclasses import dataclass

from sleb_serve.roofline.gpu import Gpu
from sleb_serve.roofline.model import BYTES, Block, Model

SPLITS = ("tensor", "layers")


@dataclass(frozen=True)
class Roofline:
    """Step time of a pruned model.

    Args:
        model: the dense model.
        gpu: each of the devices.
        gpus: how many share the model.
        removed: number of removed blocks; see `Model.share`.
        split: ``tensor`` if the devices share every matrix; ``layers`` if each holds some layers
            and they work one after another, as in Transformers by default.
    """

    model: Model
    gpu: Gpu
    gpus: int = 1
    removed: int = 0
    split: str = "tensor"

    def __call__(self, new: int, sequences: int, attended: float, cached: float) -> float:
        """Return the seconds of one step.

        Args:
            new: new tokens of all sequences.
            sequences: number of sequences; only the last token of each goes through the head.
            attended: tokens attended to, summed over the new tokens.
            cached: tokens of KV cache read, summed over the sequences.
        """
        model, gpu = self.model, self.gpu
        tp = self.gpus if self.split == "tensor" else 1
        blocks = 0.0
        for block, number in model.kinds.items():
            arithmetic, traffic = _work(block, new, sequences, attended, cached)
            blocks += number * max(arithmetic / gpu.flops, traffic / gpu.bandwidth) / tp
        if tp > 1:
            payload = new * model.hidden * BYTES
            exchange = 2 * (tp - 1) / tp * payload / gpu.link + gpu.latency
            blocks += model.num_blocks * 2 * exchange
        head = model.hidden * model.vocabulary
        top = max(2 * sequences * head / gpu.flops, head * BYTES / gpu.bandwidth) / tp
        return model.share(self.removed) * blocks + top


def _work(
    block: Block, new: int, sequences: int, attended: float, cached: float
) -> tuple[float, float]:
    """Return a block's floating-point operations and its bytes read or written."""
    cache = block.cache
    attended = new * cache.seen(attended / new)
    # Cached keys and values are read once per sequence, regardless of its new tokens.
    read = sequences * cache.seen(cached / sequences)
    through = block.parameters + block.active * block.expert_parameters
    arithmetic = 2 * new * through + 4 * attended * cache.width
    traffic = block.read(new) + cache.token * read + 2 * sequences * cache.state
    return arithmetic, traffic
