"""SLEB's greedy search over a scorer: block numbers and losses, no torch and no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal, InvalidOperation

from sleb_serve.errors import SlebError


@dataclass(frozen=True)
class Scores:
    """The losses of a step's candidates, in their order, and maybe that of `removed` alone.

    The least is exact. One that is not marked exact is a lower bound, or in a fast search an
    estimate, above the least. ``rivals`` are blocks that the text does not tell from the best.
    """

    losses: tuple[float, ...]
    exact: tuple[bool, ...]
    base: float | None = None
    rivals: tuple[int, ...] = ()


Score = Callable[[Sequence[int], Sequence[int]], Scores]
"""score(removed, candidates): the loss with `removed` and each candidate in turn gone."""


@dataclass(frozen=True)
class Step:
    """One greedy step: the loss of every candidate, in block order, and the block that won.

    ``exact`` and ``rivals`` are those of `Scores`.
    """

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


def blocks_to_remove(text: str, num_blocks: int, early_barrier: int, late_barrier: int) -> int:
    """How many blocks ``--remove`` asks for: a count, or a share of all blocks, rounded up.

    Raises:
        SlebError: not a count or a share, or more than the barriers leave.
    """
    if early_barrier < 0 or late_barrier < 0:
        raise SlebError("--early-barrier and --late-barrier count blocks: give 0 or more")
    try:
        number = Decimal(text)
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite() or number <= 0 or (number >= 1 and number != int(number)):
        raise SlebError(
            f"--remove {text}: give a whole number of blocks (6) or a share between 0 and 1 (0.2)"
        )
    # Decimal, because in binary 0.07 of 100 blocks is a little over 7 and would round up to 8.
    share = number < 1 and "." in text
    count = int((number * num_blocks if share else number).to_integral_value(ROUND_CEILING))
    most = min(num_blocks - early_barrier - late_barrier, num_blocks - 1)
    if count > most:
        raise SlebError(
            f"--remove {text}: of {num_blocks} blocks at most {max(most, 0)} can go, since the "
            f"first {early_barrier} and last {late_barrier} are kept and one must remain; ask for "
            f"fewer, or lower --early-barrier and --late-barrier"
        )
    return count


def candidates(
    num_blocks: int, removed: Sequence[int], early_barrier: int, late_barrier: int
) -> tuple[int, ...]:
    """The blocks that may go next: all alive but the first `early_barrier` and last `late_barrier`.

    As in the paper, the barriers count alive blocks (section 3.2, algorithm 1).
    """
    gone = set(removed)
    alive = [block for block in range(num_blocks) if block not in gone]
    return tuple(alive[early_barrier : len(alive) - late_barrier])


def greedy(
    score: Score,
    *,
    num_blocks: int,
    remove: int,
    early_barrier: int = 1,
    late_barrier: int = 1,
    done: Sequence[Step] = (),
    on_step: Callable[[Step], None] = lambda step: None,
) -> tuple[Step, ...]:
    """Remove blocks one by one, each time the one whose absence raises the loss least.

    Args:
        score: the loss of each candidate; see `Score`.
        num_blocks: blocks of the dense model.
        remove: how many to remove.
        early_barrier: alive blocks at the start that stay.
        late_barrier: alive blocks at the end that stay.
        done: steps of an earlier, interrupted search; they are taken over, not computed again.
        on_step: called after each step that was computed.

    Raises:
        SlebError: a loss is not a number (a NaN in the weights, an overflow in the dtype), or
            `done` is not the beginning of this search.
    """
    steps = list(done)
    for number, step in enumerate(steps, 1):
        before = [earlier.block for earlier in steps[: number - 1]]
        if step.candidates != candidates(num_blocks, before, early_barrier, late_barrier):
            raise SlebError(
                f"step {number} of the interrupted search does not fit this one; start without "
                f"--resume"
            )
    while len(steps) < remove:
        removed = [step.block for step in steps]
        eligible = candidates(num_blocks, removed, early_barrier, late_barrier)
        scores = score(removed, eligible)
        for block, loss in zip(eligible, scores.losses, strict=True):
            if not math.isfinite(loss):
                raise SlebError(
                    f"step {len(steps) + 1}: the loss without block {block} is {loss}; the weights "
                    f"hold NaN or overflow in this dtype: try --dtype float32 or check the model"
                )
        steps.append(Step(eligible, scores.losses, scores.exact, scores.rivals))
        on_step(steps[-1])
    return tuple(steps[:remove])
