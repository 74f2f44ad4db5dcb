"""The greedy search, held against a search written as plainly as can be."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sleb_serve.errors import SlebError
from sleb_serve.selection import Scores, Step, blocks_to_remove, candidates, greedy


def table_loss(removed: Sequence[int], num_blocks: int, seed: int) -> float:
    """Some loss that depends on the whole set; coarse, so that ties happen."""
    return float(hash((seed, *sorted(removed))) % 7) + len(removed)


@given(
    num_blocks=st.integers(3, 9),
    early=st.integers(0, 2),
    late=st.integers(0, 2),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_greedy_is_the_plain_greedy(
    num_blocks: int, early: int, late: int, seed: int, data: st.DataObject
) -> None:
    most = min(num_blocks - early - late, num_blocks - 1)
    if most < 1:
        return
    remove = data.draw(st.integers(1, most))

    def score(removed: Sequence[int], eligible: Sequence[int]) -> Scores:
        return exactly(table_loss([*removed, block], num_blocks, seed) for block in eligible)

    steps = greedy(
        score, num_blocks=num_blocks, remove=remove, early_barrier=early, late_barrier=late
    )

    gone: list[int] = []
    for step in steps:
        alive = [block for block in range(num_blocks) if block not in gone]
        best, best_loss = None, math.inf
        for position, block in enumerate(alive):
            if early <= position <= len(alive) - late - 1:
                loss = table_loss([*gone, block], num_blocks, seed)
                if loss < best_loss:
                    best, best_loss = block, loss
        assert (step.block, step.loss) == (best, best_loss)
        gone.append(step.block)
    assert len(steps) == remove


def exactly(losses: Iterable[float]) -> Scores:
    found = tuple(losses)
    return Scores(found, (True,) * len(found))


def test_barriers_count_alive_blocks() -> None:
    assert candidates(6, [], 1, 1) == (1, 2, 3, 4)
    assert candidates(6, [1, 4], 1, 1) == (2, 3)
    assert candidates(6, [1, 4], 2, 0) == (3, 5)
    assert candidates(6, [0, 5], 0, 0) == (1, 2, 3, 4)


def test_finished_steps_are_not_scored_again() -> None:
    def score(removed: Sequence[int], eligible: Sequence[int]) -> Scores:
        scored.append(len(removed))
        return exactly(float(-block) for block in eligible)

    scored: list[int] = []
    whole = greedy(score, num_blocks=9, remove=5)
    scored.clear()
    resumed = greedy(score, num_blocks=9, remove=5, done=whole[:2])
    assert resumed == whole
    assert scored == [2, 3, 4]
    assert greedy(score, num_blocks=9, remove=2, done=whole) == whole[:2]


def test_steps_of_another_search_are_refused() -> None:
    step = Step((1, 2, 3), (0.1, 0.2, 0.3), (True, True, True))
    with pytest.raises(SlebError, match="step 1 of the interrupted search does not fit"):
        greedy(lambda removed, eligible: exactly([0.0] * 9), num_blocks=9, remove=2, done=[step])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_search(bad: float) -> None:
    def score(removed: Sequence[int], eligible: Sequence[int]) -> Scores:
        return exactly(bad if block == 3 else 1.0 for block in eligible)

    with pytest.raises(SlebError, match=r"step 1: the loss without block 3 is (nan|inf)"):
        greedy(score, num_blocks=6, remove=1)


@pytest.mark.parametrize(
    ("text", "blocks", "expected"),
    [
        ("6", 30, 6),
        ("0.2", 30, 6),
        ("0.2", 32, 7),  # 6.4, rounded up as the official latency.py does
        ("0.07", 100, 7),  # exactly 7, though 0.07 * 100 > 7 in binary
        ("1", 30, 1),
        ("28", 30, 28),
        ("6.0", 30, 6),
    ],
)
def test_remove_is_a_count_or_a_share(text: str, blocks: int, expected: int) -> None:
    assert blocks_to_remove(text, blocks, 1, 1) == expected


@pytest.mark.parametrize("text", ["0", "-1", "30", "29", "1.5", "0.99", "six", "nan", "inf", ""])
def test_remove_refuses_what_is_neither(text: str) -> None:
    with pytest.raises(SlebError, match="--remove"):
        blocks_to_remove(text, 30, 1, 1)


def test_without_barriers_all_but_one_can_go() -> None:
    assert blocks_to_remove("29", 30, 0, 0) == 29
    with pytest.raises(SlebError, match="at most 29"):
        blocks_to_remove("30", 30, 0, 0)
    with pytest.raises(SlebError, match="0 or more"):
        blocks_to_remove("1", 30, -1, 0)


def test_the_greedy_search_need_not_be_the_best_but_never_worse_than_any_first_step() -> None:
    losses = {frozenset(c): table_loss(c, 6, 3) for n in (1, 2) for c in _pairs(n)}
    steps = greedy(
        lambda removed, eligible: exactly(losses[frozenset({*removed, b})] for b in eligible),
        num_blocks=6,
        remove=1,
    )
    assert steps[0].loss == min(losses[frozenset({b})] for b in range(1, 5))


def _pairs(size: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(6), size))
