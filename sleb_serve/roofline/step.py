"""How long one forward pass takes: the roofline, from a model's sizes and a device's peaks.

A step takes, in each block, as long as its arithmetic or its memory traffic needs, whichever is
more, plus two all-reduces with tensor parallelism. These are lower bounds of times: kernels reach a
part of the peak, which efficiencies below 1 stand for. Ratios of pruned over dense hardly depend on
them.
"""

from __future__ import annotations

from dataclasses import dataclass

from sleb_serve.roofline.gpu import Gpu
from sleb_serve.roofline.model import BYTES, Block, Model

SPLITS = ("tensor", "layers")


@dataclass(frozen=True)
class Roofline:
    """The time of a step of a model without some of its blocks.

    Args:
        model: dense.
        gpu: each of the devices.
        gpus: how many share the model.
        removed: how many blocks are left out; see `Model.share`.
        split: ``tensor`` if the devices share every matrix; ``layers`` if each holds some of the
            layers and they work one after another, as Transformers spreads a model by itself.
    """

    model: Model
    gpu: Gpu
    gpus: int = 1
    removed: int = 0
    split: str = "tensor"

    def __call__(self, new: int, sequences: int, attended: float, cached: float) -> float:
        """Seconds of one step.

        Args:
            new: tokens that go through, of all sequences.
            sequences: how many; each one's last token goes through the head.
            attended: tokens that the new ones attend to, summed over the new ones.
            cached: tokens of KV cache that are read, summed over the sequences.
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
    """A block's floating-point operations, and the bytes that it reads or writes."""
    cache = block.cache
    attended = new * cache.seen(attended / new)
    # The keys and values that are there are read once for a sequence, whatever its new tokens.
    read = sequences * cache.seen(cached / sequences)
    through = block.parameters + block.active * block.expert_parameters
    arithmetic = 2 * new * through + 4 * attended * cache.width
    traffic = block.read(new) + cache.token * read + 2 * sequences * cache.state
    return arithmetic, traffic
