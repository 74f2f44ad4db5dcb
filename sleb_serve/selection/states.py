"""The states of a layer sweep, and snapshots for the next step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from sleb_serve.models.layerwise import Call
from sleb_serve.selection.lm_head import Dense, Tally
from sleb_serve.selection.memory import Plan

BASE = -1
"""Pseudo-candidate for the model without further removals."""
_SNAPSHOTS = 10
"""Maximum number of blocks with snapshots; the removed one is nearly always among them."""


@dataclass
class SequenceStates:
    """One sequence: token ids [L], layer calls, head rows, snapshots.

    Attributes:
        parts: rows of the head, [R] each; the first contains every token to predict.
        dense: the dense model's predictions, if losses are relative to them.
        snapshots: input states of a block without removed blocks below it: {(block, gone): states}.
        bases: the base's input state of a block, in the same form.
    """

    tokens: Tensor
    calls: list[Call]
    parts: list[Tensor] = field(default_factory=list)
    dense: Dense | None = None
    snapshots: dict[tuple[int, frozenset[int]], dict[int, Tensor]] = field(default_factory=dict)
    bases: dict[tuple[int, frozenset[int]], Tensor] = field(default_factory=dict)
    tallies: dict[int, Tally] = field(default_factory=dict)

    @property
    def targets(self) -> Tensor:
        """Return the tokens to predict, [L - 1]."""
        return self.tokens[1:]


@dataclass
class Work:
    """A sequence's states during a sweep.

    Attributes:
        first: the block from which all states advance together.
        there: its input states.
        late: candidates before it without a state; they start from the base's.
        states: the states so far.
    """

    first: int
    there: dict[int, Tensor]
    late: frozenset[int]
    states: dict[int, Tensor] = field(default_factory=dict)


def key_of(index: int, gone: frozenset[int]) -> tuple[int, frozenset[int]]:
    """Return the key of a block's input state without the removed blocks below it."""
    return index, frozenset(block for block in gone if block < index)


def from_snapshot(
    sequence: SequenceStates, gone: frozenset[int], forks: frozenset[int], layers: int
) -> Work | None:
    """Return the states to continue from; None to start at the embedding."""
    for index, below in sorted(sequence.snapshots, key=lambda key: -key[0]):
        if below != key_of(index, gone)[1]:
            continue
        states = sequence.snapshots[index, below]
        late = {f for f in forks if f < index} - states.keys()
        if all(key_of(fork, gone) in sequence.bases for fork in late):
            wanted = {BASE, *forks}
            there = {fork: states[fork] for fork in states if fork in wanted}
            alive = (i for i in range(index, layers) if i not in gone)
            return Work(next(alive, layers), there, frozenset(late))
    return None


def snapshot_positions(
    sequences: Sequence[SequenceStates],
    plan: Plan,
    layers: int,
    removed: Sequence[int],
    candidates: Sequence[int],
    losses: Mapping[int, float],
) -> tuple[frozenset[int], bool]:
    """Choose the most likely candidates for snapshots, as memory allows.

    Drops snapshots that are no longer useful.

    Returns:
        The candidates, and whether the base's state at every block also fits.
    """
    gone = frozenset(removed)
    costs = {c: len(sequences) * (i + 1) for i, c in enumerate(candidates)}
    bases = len(sequences) * layers
    keeps_bases = plan.snapshots >= 2 * bases
    capacity = plan.snapshots - (bases if keeps_bases else 0)
    kept: set[int] = set()
    if losses:
        free = capacity
        likely = sorted(candidates, key=lambda c: losses.get(c, math.inf))
        for block in likely[:_SNAPSHOTS]:
            if costs[block] <= free:
                free -= costs[block]
                kept.add(block)
    else:
        # Nothing is known yet: as many as fit, evenly spread.
        strides = (set(candidates[::-stride]) for stride in range(1, len(candidates) + 1))
        kept = next((c for c in strides if sum(costs[b] for b in c) <= capacity), set())
    for sequence in sequences:
        sequence.snapshots = {
            key: states
            for key, states in sequence.snapshots.items()
            if key == key_of(key[0], gone) and (key[0] in kept or key[0] in gone)
        }
        sequence.bases = {k: v for k, v in sequence.bases.items() if k == key_of(k[0], gone)}
    return frozenset(kept), keeps_bases
