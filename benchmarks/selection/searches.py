"""Evaluated searches that the product does not offer: a beam search, and exchanges of blocks.

`quality.py` compares them with SLEB's greedy search; its record shows the results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from sleb_serve.selection.search import (
    Choice,
    Choices,
    Score,
    Scores,
    blocks_of,
    candidates,
    greedy,
)


def beam(
    score: Score,
    *,
    width: int,
    num_blocks: int,
    remove: int,
    early_barrier: int = 1,
    late_barrier: int = 1,
    among: Sequence[int] | None = None,
) -> Choices:
    """Follow the `width` best sets of removed blocks of each size, instead of one.

    The arguments are those of `greedy`; `score` must be exact for the `width` lowest losses.
    Inexact ones are not followed, because they are at least as high.
    """
    paths: list[Choices] = [()]
    for _ in range(remove):
        found: dict[frozenset[int], Choices] = {}
        for path in paths:
            removed = blocks_of(path)
            eligible = candidates(num_blocks, removed, early_barrier, late_barrier, among)
            scores = score(removed, eligible)
            for block, loss, exact in zip(eligible, scores.losses, scores.exact, strict=True):
                if exact:
                    # The same blocks in a different order are the same model.
                    found.setdefault(frozenset({*removed, block}), (*path, Choice(block, loss)))
        paths = sorted(found.values(), key=lambda path: path[-1].loss)[:width]
    return paths[0]


def swap(
    score: Score,
    *,
    num_blocks: int,
    remove: int,
    early_barrier: int = 1,
    late_barrier: int = 1,
    among: Sequence[int] | None = None,
) -> Choices:
    """Improve the greedy choice by exchanging one block at a time, until no exchange lowers a loss.

    A greedy search among the final blocks then orders them, so that the first K are also a good
    choice. The arguments are those of `greedy`.
    """
    search = partial(
        greedy,
        score,
        num_blocks=num_blocks,
        remove=remove,
        early_barrier=early_barrier,
        late_barrier=late_barrier,
    )
    start = search(among=among)
    chosen, least = list(blocks_of(start)), start[-1].loss
    tried = 0  # consecutive blocks without an improvement
    while tried < remove:
        rest = tuple(chosen[1:])
        eligible = candidates(num_blocks, rest, early_barrier, late_barrier, among)
        losses = score(rest, eligible).losses
        best = eligible[losses.index(min(losses))]
        if best != chosen[0] and min(losses) < least:
            least, tried = min(losses), 0
            chosen = [*rest, best]
        else:
            tried += 1
            chosen = [*rest, chosen[0]]
    return start if set(chosen) == set(blocks_of(start)) else search(among=chosen)


def as_repaired(
    scores: Scores, candidates: Sequence[int], shortlist: int, loss_of: Callable[[int], float]
) -> Scores:
    """Replace the best candidates' losses with those of the repaired model.

    The others are ranked behind them, because their repaired losses are unknown.

    Args:
        scores: the unrepaired losses of `candidates`.
        candidates: removable blocks.
        shortlist: number of candidates to repair.
        loss_of: returns the loss without a block and with all gaps repaired.
    """
    order = sorted(range(len(candidates)), key=lambda index: scores.losses[index])
    repaired = {index: loss_of(candidates[index]) for index in order[:shortlist]}
    worst = max(repaired.values())
    behind = [math.nextafter(max(worst, loss), math.inf) for loss in scores.losses]
    return replace(
        scores,
        losses=tuple(repaired.get(index, loss) for index, loss in enumerate(behind)),
        exact=tuple(index in repaired for index in range(len(candidates))),
        rivals=(),
    )
