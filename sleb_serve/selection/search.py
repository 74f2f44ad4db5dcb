"""SLEB's greedy search over a score: block numbers and losses, no torch, no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal

from sleb_serve.errors import SlebError


@dataclass(frozen=True)
class Scores:
    """The losses of a step's candidates, in their order, and maybe that of `removed` alone.

    The least is exact, or as many of the least as were asked for. One that is not marked exact is a
    lower bound, or in a fast search an estimate, above the least. ``rivals`` are blocks that the
    text does not tell from the best.
    """

    losses: tuple[float, ...]
    exact: tuple[bool, ...]
    base: float | None = None
    rivals: tuple[int, ...] = ()


Score = Callable[[Sequence[int], Sequence[int]], Scores]
"""score(removed, candidates): the loss with `removed` and each candidate in turn gone."""


@dataclass(frozen=True)
class Step:
    """What one call of a score said: with `removed` gone, the loss of every candidate, in order.

    ``exact`` and ``rivals`` are those of `Scores`.
    """

    removed: tuple[int, ...]
    candidates: tuple[int, ...]
    losses: tuple[float, ...]
    exact: tuple[bool, ...]
    rivals: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.candidates) == len(self.losses) == len(self.exact) > 0:
            raise ValueError("a step has one loss per candidate, and at least one candidate")

    @property
    def block(self) -> int:
        """The candidate of least loss, the first of them on a tie."""
        return self.candidates[self.losses.index(self.loss)]

    @property
    def loss(self) -> float:
        """The least loss: that of the model with this step's block gone, too."""
        return min(self.losses)


@dataclass(frozen=True)
class Choice:
    """A block that goes, and the loss once it and all before it are gone."""

    block: int
    loss: float


Choices = tuple[Choice, ...]
"""Choices in the order of removal."""


def blocks_to_remove(
    remove: int | float, num_blocks: int, early_barrier: int, late_barrier: int
) -> int:
    """How many blocks go: a count, or a share of all blocks, rounded up.

    Raises:
        SlebError: neither a count nor a share, or more than the barriers leave.
    """
    if early_barrier < 0 or late_barrier < 0:
        raise SlebError("`early_barrier` and `late_barrier` count blocks: give 0 or more")
    share = isinstance(remove, float) and 0 < remove < 1
    if not share and (not math.isfinite(remove) or remove < 1 or remove != int(remove)):
        raise SlebError(
            f"remove={remove}: give a whole number of blocks (6) or a share between 0 and 1 (0.2)"
        )
    # Decimal, because in binary 0.07 of 100 blocks is a little over 7 and would round up to 8.
    number = Decimal(str(remove)) * num_blocks if share else Decimal(int(remove))
    count = int(number.to_integral_value(ROUND_CEILING))
    most = min(num_blocks - early_barrier - late_barrier, num_blocks - 1)
    if count > most:
        raise SlebError(
            f"remove={remove}: of {num_blocks} blocks at most {max(most, 0)} can go, since the "
            f"first {early_barrier} and last {late_barrier} are kept and one must remain; ask for "
            f"fewer, or lower `early_barrier` and `late_barrier`"
        )
    return count


def candidates(
    num_blocks: int,
    removed: Sequence[int],
    early_barrier: int,
    late_barrier: int,
    among: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """The blocks that may go next: all alive but the first `early_barrier` and last `late_barrier`.

    As in the paper, the barriers count alive blocks (section 3.2, algorithm 1).
    """
    gone = set(removed)
    alive = [block for block in range(num_blocks) if block not in gone]
    found = alive[early_barrier : len(alive) - late_barrier]
    return tuple(block for block in found if among is None or block in among)


def recorded(
    score: Score, done: Sequence[Step] = (), on_step: Callable[[Step], None] = lambda step: None
) -> Score:
    """A score that replays recorded steps, then scores new ones and reports each.

    The search is deterministic, so a resumed one follows the same path.

    Args:
        score: the loss of each candidate; see `Score`.
        done: what the interrupted search had computed, in order.
        on_step: called after each step that was computed.

    Returns:
        A score that raises SlebError where a loss is not a number (a NaN in the weights, an
        overflow in the dtype), or where `done` is not the beginning of this search.
    """
    remembered = iter(done)
    number = 0

    def answer(removed: Sequence[int], eligible: Sequence[int]) -> Scores:
        nonlocal number
        number += 1
        step = next(remembered, None)
        if step is not None:
            if (step.removed, step.candidates) != (tuple(removed), tuple(eligible)):
                raise SlebError(
                    f"step {number} of the interrupted search does not fit this one; start without "
                    f"`resume`"
                )
            return Scores(step.losses, step.exact, None, step.rivals)
        scores = score(removed, eligible)
        for block, loss in zip(eligible, scores.losses, strict=True):
            if not math.isfinite(loss):
                raise SlebError(
                    f"step {number}: the loss without block {block} is {loss}; the weights hold "
                    f"NaN or overflow in this dtype: try dtype=float32 or check the model"
                )
        on_step(Step(tuple(removed), tuple(eligible), scores.losses, scores.exact, scores.rivals))
        return scores

    return answer


def greedy(
    score: Score,
    *,
    num_blocks: int,
    remove: int,
    early_barrier: int = 1,
    late_barrier: int = 1,
    among: Sequence[int] | None = None,
    allowed: Callable[[float], bool] = lambda loss: True,
) -> Choices:
    """Remove blocks one by one, each time the one whose absence raises the loss least.

    Args:
        score: the loss of each candidate; see `Score`.
        num_blocks: blocks of the dense model.
        remove: how many to remove.
        early_barrier: alive blocks at the start that stay.
        late_barrier: alive blocks at the end that stay.
        among: the only blocks that may go.
        allowed: whether a loss is still one to accept; the first that is not ends the search, and
            its block stays.
    """
    path: Choices = ()
    while len(path) < remove:
        removed = blocks_of(path)
        eligible = candidates(num_blocks, removed, early_barrier, late_barrier, among)
        losses = score(removed, eligible).losses
        best = losses.index(min(losses))
        if not allowed(losses[best]):
            break
        path += (Choice(eligible[best], losses[best]),)
    return path


def blocks_of(path: Choices) -> tuple[int, ...]:
    """The blocks of choices, in order."""
    return tuple(choice.block for choice in path)
