"""SLEB's greedy search on block numbers and losses, independent of torch and models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal

from sleb_serve.errors import SlebError


@dataclass(frozen=True)
class Scores:
    """The losses of a step's candidates, in order, and optionally that of `removed` alone.

    The lowest loss, or the requested number of lowest losses, is exact. Others are lower bounds, or
    in a fast search estimates, above the lowest. ``rivals`` are blocks within two standard errors
    of the best.
    """

    losses: tuple[float, ...]
    exact: tuple[bool, ...]
    base: float | None = None
    rivals: tuple[int, ...] = ()


Score = Callable[[Sequence[int], Sequence[int]], Scores]
"""score(removed, candidates): returns the loss without `removed` and each candidate."""


@dataclass(frozen=True)
class Step:
    """Result of one score call: the loss of every candidate without `removed`, in order.

    ``exact`` and ``rivals`` are as in `Scores`.
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
        """Return the candidate with the lowest loss, the first on a tie."""
        return self.candidates[self.losses.index(self.loss)]

    @property
    def loss(self) -> float:
        """Return the lowest loss, that of the model without this step's block."""
        return min(self.losses)


@dataclass(frozen=True)
class Choice:
    """A removed block, and the loss with it and all before it removed."""

    block: int
    loss: float


Choices = tuple[Choice, ...]
"""Return choices in order of removal."""


def blocks_to_remove(
    remove: int | float, num_blocks: int, early_barrier: int, late_barrier: int
) -> int:
    """Return the number of blocks to remove, from a count or a share of all blocks, rounded up.

    Raises:
        SlebError: it is neither a count nor a share, or more than the barriers allow.
    """
    if early_barrier < 0 or late_barrier < 0:
        raise SlebError("`early_barrier` and `late_barrier` count blocks: give 0 or more")
    share = isinstance(remove, float) and 0 < remove < 1
    if not share and (not math.isfinite(remove) or remove < 1 or remove != int(remove)):
        raise SlebError(
            f"remove={remove}: give a whole number of blocks (6) or a share between 0 and 1 (0.2)"
        )
    # Decimal, because in binary 0.07 of 100 blocks is slightly above 7 and would round up to 8.
    number = Decimal(str(remove)) * num_blocks if share else Decimal(int(remove))
    count = int(number.to_integral_value(ROUND_CEILING))
    most = min(num_blocks - early_barrier - late_barrier, num_blocks - 1)
    if count > most:
        raise SlebError(
            f"remove={remove}: of {num_blocks} blocks at most {max(most, 0)} can be removed, since "
            f"the first {early_barrier} and last {late_barrier} are kept and one must remain; ask "
            f"for fewer, or lower `early_barrier` and `late_barrier`"
        )
    return count


def candidates(
    num_blocks: int,
    removed: Sequence[int],
    early_barrier: int,
    late_barrier: int,
    among: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Return the removable blocks: all except the first `early_barrier` and last `late_barrier`.

    As in the paper, the barriers count remaining blocks (section 3.2, algorithm 1).
    """
    gone = set(removed)
    alive = [block for block in range(num_blocks) if block not in gone]
    found = alive[early_barrier : len(alive) - late_barrier]
    return tuple(block for block in found if among is None or block in among)


def recorded(
    score: Score, done: Sequence[Step] = (), on_step: Callable[[Step], None] = lambda step: None
) -> Score:
    """Replays recorded steps, then scores new ones and reports each.

    The search is deterministic, so a resumed one follows the same path.

    Args:
        score: the loss of each candidate; see `Score`.
        done: the steps of the interrupted search, in order.
        on_step: called after each computed step.

    Returns:
        A score that raises SlebError if a loss is not a number (a NaN in the weights, an overflow
        in the dtype), or if `done` is not the beginning of this search.
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
    """Remove blocks one by one, each time the one that raises the loss least.

    Args:
        score: the loss of each candidate; see `Score`.
        num_blocks: number of blocks of the dense model.
        remove: number of blocks to remove.
        early_barrier: number of first remaining blocks to keep.
        late_barrier: number of last remaining blocks to keep.
        among: the removable blocks.
        allowed: whether a loss is acceptable; the first unacceptable one ends the search, and its
            block is kept.
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
    """Return the blocks of choices, in order."""
    return tuple(choice.block for choice in path)
