"""The greedy search against a plain implementation."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from searches import beam, swap

from sleb_serve.cli.select import amount
from sleb_serve.errors import SlebError
from sleb_serve.selection.search import (
    Score,
    Scores,
    Step,
    blocks_to_remove,
    candidates,
    greedy,
    recorded,
)


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
    assume(most > 0)
    remove = data.draw(st.integers(1, most))

    def score(removed: Sequence[int], eligible: Sequence[int]) -> Scores:
        return exactly(table_loss([*removed, block], num_blocks, seed) for block in eligible)

    choices = greedy(
        score, num_blocks=num_blocks, remove=remove, early_barrier=early, late_barrier=late
    )

    gone: list[int] = []
    for choice in choices:
        alive = [block for block in range(num_blocks) if block not in gone]
        best, best_loss = None, math.inf
        for position, block in enumerate(alive):
            if early <= position <= len(alive) - late - 1:
                loss = table_loss([*gone, block], num_blocks, seed)
                if loss < best_loss:
                    best, best_loss = block, loss
        assert (choice.block, choice.loss) == (best, best_loss)
        gone.append(choice.block)
    assert len(choices) == remove


@given(num_blocks=st.integers(4, 9), limit=st.floats(0, 12), seed=st.integers(0, 1000))
def test_a_limit_ends_the_search_before_the_first_loss_beyond_it(
    num_blocks: int, limit: float, seed: int
) -> None:
    def score(removed: Sequence[int], eligible: Sequence[int]) -> Scores:
        return exactly(table_loss([*removed, block], num_blocks, seed) for block in eligible)

    whole = greedy(score, num_blocks=num_blocks, remove=num_blocks - 2)
    found = greedy(
        score, num_blocks=num_blocks, remove=num_blocks - 2, allowed=lambda loss: loss < limit
    )
    assert found == tuple(itertools.takewhile(lambda choice: choice.loss < limit, whole))


def exact_least(least: int, score: Score) -> Score:
    """As a scorer that is asked for so many exact losses may answer: the others are bounds."""

    def answer(removed: Sequence[int], eligible: Sequence[int]) -> Scores:
        losses = score(removed, eligible).losses
        exact = [False] * len(losses)
        for index in sorted(range(len(losses)), key=lambda i: losses[i])[:least]:
            exact[index] = True
        limit = max(loss for loss, whole in zip(losses, exact, strict=True) if whole)
        return Scores(
            tuple(loss if e else (loss + limit) / 2 for loss, e in zip(losses, exact, strict=True)),
            tuple(exact),
        )

    return answer


def random_loss(removed: Iterable[int], seed: int) -> float:
    return random.Random(f"{seed} {sorted(removed)}").random() + len(set(removed))


@given(blocks=st.integers(4, 8), width=st.integers(1, 6), seed=st.integers(0, 1000))
def test_a_beam_keeps_the_best_sets_of_each_size(blocks: int, width: int, seed: int) -> None:
    def score(removed: Sequence[int], eligible: Sequence[int]) -> Scores:
        return exactly(random_loss([*removed, block], seed) for block in eligible)

    remove = min(3, blocks - 2)
    found = beam(exact_least(width, score), width=width, num_blocks=blocks, remove=remove)
    sets: list[frozenset[int]] = [frozenset()]
    for _ in range(remove):
        children = {s | {b} for s in sets for b in range(1, blocks - 1) if b not in s}
        sets = sorted(children, key=lambda s: random_loss(s, seed))[:width]
    assert {choice.block for choice in found} == sets[0]
    for count, choice in enumerate(found, 1):
        assert choice.loss == random_loss([c.block for c in found[:count]], seed)
    if width == 1:
        assert found == greedy(score, num_blocks=blocks, remove=remove)


@given(blocks=st.integers(4, 8), seed=st.integers(0, 1000))
def test_after_swaps_no_exchange_of_one_block_is_better(blocks: int, seed: int) -> None:
    def score(removed: Sequence[int], eligible: Sequence[int]) -> Scores:
        return exactly(random_loss([*removed, block], seed) for block in eligible)

    remove = min(3, blocks - 2)
    found = swap(score, num_blocks=blocks, remove=remove)
    chosen = frozenset(choice.block for choice in found)
    assert len(chosen) == remove
    assert found[-1].loss <= greedy(score, num_blocks=blocks, remove=remove)[-1].loss
    for out in chosen:
        for into in set(range(1, blocks - 1)) - chosen:
            assert found[-1].loss <= random_loss(chosen - {out} | {into}, seed)
    for count, choice in enumerate(found, 1):
        assert choice.loss == random_loss([c.block for c in found[:count]], seed)


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
    steps: list[Step] = []
    whole = greedy(recorded(score, (), steps.append), num_blocks=9, remove=5)
    scored.clear()
    new: list[Step] = []
    resumed = greedy(recorded(score, steps[:2], new.append), num_blocks=9, remove=5)
    assert resumed == whole
    assert scored == [2, 3, 4]
    assert new == steps[2:]
    assert greedy(recorded(score, steps), num_blocks=9, remove=2) == whole[:2]


def test_steps_of_another_search_are_refused() -> None:
    for removed, blocks in (((), (1, 2, 3)), ((4,), tuple(range(1, 8)))):
        step = Step(removed, blocks, (0.1,) * len(blocks), (True,) * len(blocks))
        score = recorded(lambda removed, eligible: exactly([0.0] * 9), [step])
        with pytest.raises(SlebError, match="step 1 of the interrupted search does not fit"):
            greedy(score, num_blocks=9, remove=2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_search(bad: float) -> None:
    def score(removed: Sequence[int], eligible: Sequence[int]) -> Scores:
        return exactly(bad if block == 3 else 1.0 for block in eligible)

    with pytest.raises(SlebError, match=r"step 1: the loss without block 3 is (nan|inf)"):
        greedy(recorded(score), num_blocks=6, remove=1)


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
    assert blocks_to_remove(amount(text), blocks, 1, 1) == expected


@pytest.mark.parametrize("text", ["0", "-1", "30", "29", "1.5", "0.99", "six", "nan", "inf", ""])
def test_remove_refuses_what_is_neither(text: str) -> None:
    with pytest.raises(SlebError, match=r"(remove=|--remove )"):
        blocks_to_remove(amount(text), 30, 1, 1)


def test_without_barriers_all_but_one_can_go() -> None:
    assert blocks_to_remove(29, 30, 0, 0) == 29
    with pytest.raises(SlebError, match="at most 29"):
        blocks_to_remove(30, 30, 0, 0)
    with pytest.raises(SlebError, match="0 or more"):
        blocks_to_remove(1, 30, -1, 0)


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
