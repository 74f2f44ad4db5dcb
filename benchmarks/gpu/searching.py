"""Measure `select` on the GPU: time, share of the matrix peak, and the plain method."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from kit import Kit, on_gpu, synchronize
from made import llama_7b
from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.data.calibration import Sequences, make_sequences
from sleb_serve.data.texts import EMBEDDED
from sleb_serve.data.tokenizer import load_tokenizer
from sleb_serve.evaluation.perplexity import perplexity
from sleb_serve.models.layerwise import CausalLM
from sleb_serve.models.loading import load_model
from sleb_serve.models.pruned import blocks_deleted
from sleb_serve.selection.config import Progress, SelectConfig
from sleb_serve.selection.pipeline import select
from sleb_serve.selection.search import Step

PASSES = 3
"""Measured plain passes, after one for warm-up."""


class Clock(Progress):
    """Start of the search, and ends of its steps."""

    def __init__(self) -> None:
        self.begin = self.end = 0.0
        self.steps: list[float] = []

    def step_begins(self, number: int, candidates: int, layers: int) -> None:
        """Start the clock at the first step, after loading."""
        self.begin = self.begin or time.monotonic()

    def step_ended(self, number: int, step: Step) -> None:
        """Record a step's end; its losses were read, so the GPU has finished it."""
        before, self.end = self.end or self.begin, time.monotonic()
        self.steps.append(round(self.end - before, 3))


def step_select(kit: Kit) -> None:
    """Remove 7 of 32 blocks on 16 x 2,048 tokens: greedy, fast, and plain passes."""
    folder = llama_7b(kit)
    sequences, length, remove = (2, 64, 2) if kit.tiny else (16, 2048, 7)
    dtype: Literal["bfloat16", "float32"] = "bfloat16" if on_gpu() else "float32"
    checkpoint = open_checkpoint(str(folder))
    with kit.telling("peak") as found:
        from sleb_serve.roofline.device import device_here

        peak = device_here()
        found |= {"flops": peak.flops, "bandwidth": peak.bandwidth}
    for search in ("greedy", "fast"):
        config = SelectConfig(
            remove=remove,
            calibration=EMBEDDED,
            sequences=sequences,
            sequence_length=length,
            dtype=dtype,
            search=search,
        )
        with kit.telling("select", search=search, sequences=sequences, length=length) as found:
            found |= _searched(checkpoint, folder, config, peak.flops)
    with kit.telling("plain passes") as found:
        text = make_sequences(
            EMBEDDED, load_tokenizer(checkpoint), sequences=sequences, sequence_length=length
        )
        found |= _plain(checkpoint, text, dtype, remove)


def _searched(
    checkpoint: Checkpoint, folder: Path, config: SelectConfig, peak: float
) -> dict[str, Any]:
    """Run a search through the Python API; flop/s count only the layers' weights."""
    clock, begin = Clock(), time.monotonic()
    with _counted() as runs:
        manifest = select(str(folder), config, progress=clock)
    wall, searched = time.monotonic() - begin, clock.end - clock.begin
    counts = checkpoint.parameter_counts()
    block = sum(counts[1]) / len(counts[1]) if counts else 0
    rate = 2 * block * (config.sequence_length or 0) * sum(runs) / searched
    return {
        "wall_s": round(wall, 2),
        "search_s": round(searched, 2),
        "steps_s": clock.steps,
        "layer_runs": sum(runs),
        "layers_flop_s": rate,
        "share_of_peak": rate / peak,
        "removed": [removal.block for removal in manifest.removed],
    }


@contextmanager
def _counted() -> Iterator[list[int]]:
    """Record the number of states in each layer call inside the context."""
    runs: list[int] = []
    run = CausalLM.run

    def counted(model: CausalLM, layer: Any, states: Any, call: Any) -> Any:
        runs.append(len(states))
        return run(model, layer, states, call)

    CausalLM.run = counted  # type: ignore[method-assign]
    try:
        yield runs
    finally:
        CausalLM.run = run  # type: ignore[method-assign]


def _plain(checkpoint: Checkpoint, text: Sequences, dtype: str, remove: int) -> dict[str, Any]:
    """Time passes of the official method: delete a candidate, run all sequences."""
    model = load_model(checkpoint, dtype)
    blocks = checkpoint.num_blocks
    passes = []
    for block in range(1, 2 + PASSES):
        synchronize()
        begin = time.monotonic()
        with blocks_deleted(model, [min(block, blocks - 2)]):
            perplexity(model, text.tokens)
        passes.append(round(time.monotonic() - begin, 3))
    # Step k scores all remaining blocks except the ends, with one layer less each.
    candidates = [blocks - 2 - k for k in range(remove)]
    layers = [(blocks - 1 - k) / (blocks - 1) for k in range(remove)]
    whole = sum(c * share for c, share in zip(candidates, layers, strict=True))
    return {
        "passes_s": passes,
        "passes_in_all": sum(candidates),
        "extrapolated_s": round(min(passes[1:]) * whole, 1),
    }
