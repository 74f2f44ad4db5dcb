"""Compute how the search's work grows with blocks, text and vocabulary, and predict LLaMA-2.

Usage: scaling.py SPEED.jsonl > scaling.md. Counts runs of a layer on one sequence's states and rows
of the head, for the plain search and the sweep, by formula; compares the formula with the counts
recorded by speed.py; and converts the counts to operations for larger models. No model is run.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

FIRST_PART = 12
"""The first part of the vocabulary is one in this many rows (`sleb_serve.selection.lm_head`)."""
WHOLE_A_STEP = 3.6
"""Additional whole-head passes per step, fitted to measurements on SmolLM2."""
TRIALS = 200
A100_FLOPS, A100_SHARE = 312e12, 0.5
LINK_BYTES = 25e9


NOTE = """
A100-seconds are products of matrices alone at half of 312 TFLOP/s. The sweep's gain comes from
layers that candidates share (2 times), from what lies before a removed block (1.2 to 1.5 times on
average) and from the head, which is a fifth of SmolLM2's pass and less than a hundredth of
LLaMA-2-70B's. All of it grows with the square of the blocks, like the plain search's, and in
proportion to the sequences; the vocabulary counts by the head's share only. A model that is read
from disk is read once a step.

No exact search can do much less: a candidate can be given up before all text was seen only once its
loss so far exceeds the best's whole loss. With the losses in the demo's log, token by token and the
best first, that saves at most 10.5 % of the runs; the next step's base, which the winner's states
already hold, would save 5 % more. Of the 5,828 runs that are left 4,900 remain: 4 times less work
than the plain search on SmolLM2, not 5."""


@dataclass(frozen=True)
class Model:
    """Sizes that determine the work."""

    name: str
    blocks: int
    remove: int
    layer_parameters: float
    head_parameters: float
    length: int
    sequences: int

    @property
    def head_in_layers(self) -> float:
        """Return the whole head's cost in layer runs."""
        return self.head_parameters / self.layer_parameters


SMOLLM2 = Model("SmolLM2-135M", 30, 6, 3.54e6, 28.3e6, 512, 4)
LARGE = (
    Model("LLaMA-2-7B", 32, 7, 202.4e6, 131e6, 2048, 4),
    Model("LLaMA-2-70B", 80, 16, 855.7e6, 262e6, 2048, 4),
)


def plain(model: Model) -> tuple[int, int]:
    """Return layer runs and whole heads per sequence, with one model pass per candidate."""
    sizes = range(model.blocks, model.blocks - model.remove, -1)
    return sum((n - 2) * (n - 1) for n in sizes), sum(n - 2 for n in sizes)


def sweep(blocks: int, order: Sequence[int]) -> list[int]:
    """Return layer runs per sequence in each step, with snapshots at removed blocks."""
    steps = []
    for number in range(len(order)):
        gone = set(order[:number])
        alive = [i for i in range(blocks) if i not in gone]
        candidates = alive[1:-1]
        start = order[number - 1] if number else -1
        behind = sum(i > start for i in alive)
        runs = sum(behind if c < start else sum(i > c for i in alive) for c in candidates)
        # The base runs up to the last candidate, and in the first step to the end.
        runs += behind if not number else sum(start < i < candidates[-1] for i in alive)
        steps.append(runs)
    return steps


def expected(model: Model) -> float:
    """Return the sweep's mean layer runs over random orders of removal."""
    generator = random.Random(0)
    found = []
    for _ in range(TRIALS):
        order: list[int] = []
        for _ in range(model.remove):
            left = [i for i in range(1, model.blocks - 1) if i not in order]
            order.append(generator.choice(left))
        found.append(sum(sweep(model.blocks, order)))
    return fmean(found)


def main() -> None:
    """Print the tables as Markdown."""
    lines = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    steps = [e for e in lines if e.get("layer_runs")]
    print("# How the search scales\n")
    print("Runs of a layer on one sequence's states, by formula and as counted by speed.py.\n")
    print("| step of SmolLM2's search, a sequence | 1 | 2 | 3 | 4 | 5 | 6 |")
    print("|---|---|---|---|---|---|---|")
    own = [e for e in steps if e["sequences"] == 4]
    order = [e["block"] for e in own if e["search"] == "greedy"]
    sizes = range(SMOLLM2.blocks, SMOLLM2.blocks - SMOLLM2.remove, -1)
    rows: list[tuple[str, list[float]]] = [
        ("plain, formula", [(n - 2) * (n - 1) for n in sizes]),
        ("plain, counted", [e["layer_runs"] / 4 for e in own if e["search"] == "naive"]),
        ("sweep, formula", list(sweep(SMOLLM2.blocks, order))),
        ("sweep, counted", [e["layer_runs"] / 4 for e in own if e["search"] == "greedy"]),
        ("fast, counted", [e["layer_runs"] / 4 for e in own if e["search"] == "fast"]),
    ]
    for name, values in rows:
        print(f"| {name} |", " | ".join(f"{value:.0f}" for value in values), "|")
    heads = sum(e["head_rows"] for e in own if e["search"] == "greedy") / 4 / 49152
    part = plain(SMOLLM2)[1] / FIRST_PART + WHOLE_A_STEP * SMOLLM2.remove + 3
    print(
        f"\nWhole heads a sequence: plain {plain(SMOLLM2)[1]}, sweep counted {heads:.1f}, ", end=""
    )
    print(f"by formula {part:.1f}.\n")
    runs, whole = plain(SMOLLM2)
    total = runs + whole * SMOLLM2.head_in_layers
    print("| sequences of SmolLM2 | fast: layer runs | against plain | work against plain |")
    print("|---|---|---|---|")
    for count in sorted({e["sequences"] for e in steps if e["search"] == "fast"}):
        mine = [e for e in steps if e["search"] == "fast" and e["sequences"] == count]
        layers = sum(e["layer_runs"] for e in mine) / count
        rest = sum(e["head_rows"] for e in mine) / count / 49152 * SMOLLM2.head_in_layers
        print(f"| {count} | {layers:.0f} a sequence | {runs / layers:.1f} times fewer ", end="")
        print(f"| {total / (layers + rest):.1f} times less |")
    print("\nPredicted, for random orders of removal, not measured:\n")
    print(
        "| | blocks, removed | plain: runs, heads | sweep: runs, heads | work | A100-seconds ",
        end="",
    )
    print("a sequence, plain and sweep | weights read a search, at 25 GB/s |")
    print("|---|---|---|---|---|---|---|")
    for model in (SMOLLM2, *LARGE):
        runs, whole = plain(model)
        ours = expected(model)
        head = whole / FIRST_PART + WHOLE_A_STEP * model.remove + 3
        before, after = runs + whole * model.head_in_layers, ours + head * model.head_in_layers
        unit = 2 * model.layer_parameters * model.length / (A100_FLOPS * A100_SHARE)
        read = 2 * model.blocks * model.layer_parameters * model.remove
        print(f"| {model.name} | {model.blocks}, {model.remove} | {runs}, {whole} ", end="")
        print(f"| {ours:.0f}, {head:.0f} | {before / after:.1f} times less ", end="")
        print(f"| {before * unit:.1f}, {after * unit:.1f} | {read / LINK_BYTES:.0f} s |")
    print(NOTE)


if __name__ == "__main__":
    main()
