"""Number of blocks to remove for a target speed-up, according to the roofline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sleb_serve.errors import SlebError
from sleb_serve.roofline.gpu import gpu_named
from sleb_serve.roofline.model import Model
from sleb_serve.roofline.plan import check_plan, predict

LOADS = ("generation", "prompt")


@dataclass(frozen=True)
class SpeedTarget:
    """A target speed-up of pruned over dense.

    Attributes:
        speedup: dense over pruned time, above 1.
        gpu: one of `sleb_serve.roofline.gpu.GPUS`.
        gpus: number of GPUs that share the model by tensor parallelism.
        load: the paper's ``generation`` (64 sequences of 64 + 128 tokens) or ``prompt`` (2,048
            tokens).
    """

    speedup: float
    gpu: str = "A100-80G"
    gpus: int = 1
    load: Literal["generation", "prompt"] = "generation"


def blocks_for(model: Model, target: SpeedTarget) -> int:
    """Return the smallest number of removed blocks that reaches the target, by the roofline.

    Raises:
        SlebError: no number of blocks suffices, or the model does not fit the GPUs.
    """
    if not 1 < target.speedup < 1e6:
        raise SlebError(f"target_speedup={target.speedup}: give a number above 1, as 1.25")
    if target.load not in LOADS:
        raise SlebError(f"load={target.load}: choose one of {', '.join(LOADS)}")
    gpu = gpu_named(target.gpu)
    check_plan(model, target.gpus, ())

    def seconds(removed: int) -> float:
        found = predict(model, gpu, target.gpus, removed)
        return found.prompt if target.load == "prompt" else 1 / found.generation

    dense, gain = seconds(0), 1.0
    for removed in range(1, model.num_blocks):
        gain = dense / seconds(removed)
        if gain >= target.speedup:
            return removed
    raise SlebError(
        f"target_speedup={target.speedup:g}: {model.num_blocks - 1} of {model.num_blocks} blocks "
        f"give {gain:.2f} at most on {target.gpus} x {gpu.name}; ask for less"
    )
