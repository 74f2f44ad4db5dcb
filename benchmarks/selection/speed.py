"""Compare the search with a plain run of the official algorithm: CPU-seconds, in one process.

Usage: speed.py OUTPUT.jsonl [--dtype float32 bfloat16] [--rounds N] [--sequences N] [--searches …].
SmolLM2, 4 sequences of 512 tokens, 6 blocks removed. A plain run works like the authors' sleb.py:
for each candidate the block is removed from the model's list of layers, each sequence runs through
the whole model, and the loss is the cross-entropy of its float32 logits. Every step's CPU-seconds
are a line of OUTPUT, with the number of layer runs on a sequence's states and of head rows
multiplied with them.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import resource
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sleb_bench.demo_model import demo_model
from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.data.calibration import Sequences, make_sequences
from sleb_serve.data.tokenizer import load_tokenizer
from sleb_serve.models.layerwise import CausalLM
from sleb_serve.models.loading import load_model
from sleb_serve.selection.layer_sweep import LayerSweep
from sleb_serve.selection.scorer import Scorer
from sleb_serve.selection.search import Scores, greedy
from sleb_serve.utils.distributed import Ranks

REMOVE, LENGTH = 6, 512

Record = Callable[..., None]


def main() -> None:
    """Run the three searches in turns and append a line per step."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--text", default="wikitext2")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--searches", nargs="+", default=["naive", "greedy", "fast"])
    options = parser.parse_args()
    checkpoint = open_checkpoint(str(demo_model(Path(".cache/demo").resolve())))
    sequences = make_sequences(
        options.text,
        load_tokenizer(checkpoint),
        sequences=options.sequences,
        sequence_length=LENGTH,
    )
    record = recorder(options.output)
    record(
        machine=platform.processor() or platform.machine(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        torch=version("torch"),
        transformers=version("transformers"),
        text=options.text,
        sequences=options.sequences,
        tokens=LENGTH,
    )
    for number in range(options.rounds):
        for dtype in options.dtype:
            for name in options.searches:
                tell = functools.partial(
                    record, round=number, sequences=options.sequences, dtype=dtype, search=name
                )
                if name == "naive":
                    naive(checkpoint, sequences, dtype, tell)
                else:
                    ours(checkpoint, sequences, dtype, name == "fast", tell)


def naive(checkpoint: Checkpoint, sequences: Sequences, dtype: str, record: Record) -> None:
    """Run the official algorithm plainly: one model pass per candidate and sequence."""
    model: Any = load_model(checkpoint, dtype)
    layers = list(model.model.layers)

    @torch.no_grad()  # type: ignore[untyped-decorator, unused-ignore]
    def loss(removed: Sequence[int]) -> float:
        model.model.layers = nn.ModuleList(
            layer for i, layer in enumerate(layers) if i not in removed
        )
        total = 0.0
        for sequence in sequences.tokens:
            ids = torch.tensor([sequence])
            logits = model(ids, use_cache=False).logits.float()
            total += float(nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]))
        return total / len(sequences.tokens)

    work = Work()

    def score(removed: Sequence[int], candidates: Sequence[int]) -> Scores:
        losses = tuple(loss([*removed, block]) for block in candidates)
        passes = len(candidates) * len(sequences.tokens)
        work.layers += passes * (len(layers) - len(removed) - 1)
        work.rows += passes * model.get_output_embeddings().weight.shape[0]
        return Scores(losses, (True,) * len(losses))

    loss([])  # warm-up
    search(score, len(layers), work, record)


def ours(
    checkpoint: Checkpoint, sequences: Sequences, dtype: str, fast: bool, record: Record
) -> None:
    """Run the search as in `sleb-serve select`."""
    scorer = Scorer(
        checkpoint, sequences, Ranks(), dtype=dtype, budget=None, steps=REMOVE, fast=fast
    )
    base: list[float] = []
    work = Work()
    for sweep in (scorer.sweep, scorer.screen):
        if sweep is not None:
            assert isinstance(sweep, LayerSweep)
            work.watch(sweep.model)

    def score(removed: Sequence[int], candidates: Sequence[int]) -> Scores:
        scores = scorer.score(removed, candidates, base[-1] if base else None, lambda: None)
        base.append(min(scores.losses))
        return scores

    search(score, checkpoint.num_blocks, work, record)


class Work:
    """Work counts: layer runs on a sequence's states, and head rows multiplied with them."""

    def __init__(self) -> None:
        self.layers = self.rows = 0

    def watch(self, model: CausalLM) -> None:
        """Count a model's work from now on."""
        run, logits = model.run, model.logits

        def counted_run(layer: Any, states: Any, call: Any) -> Any:
            self.layers += len(states)
            return run(layer, states, call)

        def counted_logits(normed: Any, rows: Any) -> Any:
            found = logits(normed, rows)
            self.rows += found.shape[1]
            return found

        model.run, model.logits = counted_run, counted_logits


def search(
    score: Callable[[Sequence[int], Sequence[int]], Scores],
    num_blocks: int,
    work: Work,
    record: Record,
) -> None:
    """Run a greedy search; report each step's cost."""

    def timed(removed: Sequence[int], candidates: Sequence[int]) -> Scores:
        before, begin = cpu_seconds(), time.perf_counter()
        layers, rows = work.layers, work.rows
        scores = score(removed, candidates)
        best = candidates[scores.losses.index(min(scores.losses))]
        record(
            step=len(removed) + 1,
            block=best,
            loss=min(scores.losses),
            exact=sum(scores.exact),
            cpu_s=round(cpu_seconds() - before, 3),
            wall_s=round(time.perf_counter() - begin, 3),
            layer_runs=work.layers - layers,
            head_rows=work.rows - rows,
        )
        return scores

    greedy(timed, num_blocks=num_blocks, remove=REMOVE)


def recorder(path: Path) -> Record:
    """Appends lines to `path`, and prints them."""

    def record(**entry: Any) -> None:
        line = json.dumps(entry)
        print(line, flush=True)
        with path.open("a") as file:
            file.write(line + "\n")

    return record


def cpu_seconds() -> float:
    """Return this process's CPU-seconds on all cores, in user and system mode."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
