"""Measure a step of `heal` on the GPU: tokens/s, memory."""

from __future__ import annotations

import random
import time
from array import array
from statistics import median
from typing import Any

from kit import Kit, on_gpu, spread, synchronize
from made import llama_7b
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.data.training import Passage
from sleb_serve.healing.distillation import learn, predicted
from sleb_serve.healing.twin import Twin, adaptable
from sleb_serve.models.loading import load_model

RANK, STEPS = 32, 5


def step_heal(kit: Kit) -> None:
    """Measure steps of teacher and student, with and without checkpointing."""
    at_once, length = (2, 32) if kit.tiny else (4, 512)
    checkpoint = open_checkpoint(str(llama_7b(kit)))
    model: Any = load_model(checkpoint, "bfloat16" if on_gpu() else "float32")
    model.requires_grad_(False)
    count = checkpoint.num_blocks
    removed = tuple(sorted(spread(count, max(1, count * 7 // 32))))
    kept = [block for block in range(count) if block not in removed]
    draw, vocabulary = random.Random(0), int(model.config.vocab_size)
    text = [
        Passage(array("i", (draw.randrange(vocabulary) for _ in range(length))), b"\1" * length)
        for _ in range(at_once)
    ]
    for again in (True, False):
        about = {"checkpointing": again, "rank": RANK, "batch": [at_once, length]}
        with kit.telling("heal", **about) as found:
            names = adaptable(model, checkpoint, kept, None)
            twin = Twin(model, removed, names, rank=RANK, seed=0, checkpointing=again)
            try:
                found |= _steps(twin, text, at_once * length)
            finally:
                twin.close()


def _steps(twin: Twin, text: list[Passage], tokens: int) -> dict[str, Any]:
    """Time some steps after a warm-up step, without the optimizer's work."""
    import torch

    seconds = []
    for _ in range(STEPS + 1):
        synchronize()
        begin = time.monotonic()
        learn(twin, text, predicted(text))
        synchronize()
        seconds.append(round(time.monotonic() - begin, 4))
    peak = torch.cuda.max_memory_allocated() if on_gpu() else None
    return {"steps_s": seconds, "tokens_s": tokens / median(seconds[1:]), "peak_bytes": peak}
