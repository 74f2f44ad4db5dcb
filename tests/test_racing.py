"""The fast search: error rate, skipped work, and exact results."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

import oracle
from conftest import Models
from sleb_serve.selection.racing import Budget, Drop, FastSearch, _tail, racing, rivals
from sleb_serve.selection.search import Scores, Step, greedy, recorded
from sweeps import random_windows, sweep_of


@pytest.mark.parametrize("degrees", [9, 15, 63, 500])
@pytest.mark.parametrize("t", [-2.0, 0.0, 0.5, 1.5, 3.0, 5.0])
def test_the_tail_is_students(t: float, degrees: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert _tail(t, degrees) == pytest.approx(stats.t.sf(t, degrees), rel=0.15, abs=1e-7)


def test_a_budget_is_spent_on_the_least_likely_and_never_overdrawn() -> None:
    budget = Budget(0.05)
    assert budget.spend({1: 0.5, 2: 0.02, 3: 0.001, 4: 0.02}) == {2, 3, 4}
    assert budget.spend({1: 0.5, 5: 0.02}) == frozenset()
    assert budget.spend({1: 0.5, 5: 0.008}) == {5}


def test_a_race_drops_the_true_winner_no_more_often_than_it_may() -> None:
    """Twelve candidates, four sequences of 16 segments: the winner is the least over all four."""
    generator = random.Random(0)
    errors = dropped = 0
    trials = 600
    for _ in range(trials):
        text = [generator.gauss(4, 1) for _ in range(64)]
        costs = [0.05 * rank for rank in range(12)]
        losses = [[x + generator.gauss(cost, 0.3) for x in text] for cost in costs]
        winner = min(range(12), key=lambda c: sum(losses[c]))
        drop, alive = racing(Budget(0.1)), set(range(12))
        for seen in (16, 32, 48):
            alive -= drop({c: losses[c][:seen] for c in sorted(alive)}, seen / 64)
        errors += winner not in alive
        dropped += 12 - len(alive)
    assert errors <= 0.1 * trials
    assert dropped / trials > 4  # and it is worth it


def test_rivals_are_those_within_two_standard_errors() -> None:
    winner = [1.0, 2.0, 3.0, 4.0] * 8
    close = [x + (0.5 if i % 2 else -0.4) for i, x in enumerate(winner)]
    far = [x + (0.5 if i % 2 else 0.4) for i, x in enumerate(winner)]
    assert rivals({3: winner, 5: close, 7: far}, 3) == (5,)


class Table:
    """Losses that add up block by block, with a little noise from step to step."""

    def __init__(self, blocks: int) -> None:
        generator = random.Random(1)
        self.costs = [0.1 * 1.3**rank for rank in range(blocks)]
        generator.shuffle(self.costs)
        self.asked: list[int] = []
        self._noise = [[1 + generator.gauss(0, 0.03) for _ in range(blocks)] for _ in range(blocks)]

    def loss(self, removed: Sequence[int]) -> float:
        noise = self._noise[len(removed) - 1] if removed else []
        return 2 + sum(self.costs[b] * (noise[b] if b == removed[-1] else 1) for b in removed)

    def score(
        self,
        removed: Sequence[int],
        candidates: Sequence[int],
        *,
        on_layer: Callable[[], None] = lambda: None,
        drop: Drop = lambda segments, share: frozenset(),
        slack: float = 0,
    ) -> Scores:
        self.asked.append(len(candidates))
        losses = tuple(self.loss([*removed, block]) for block in candidates)
        return Scores(losses, (True,) * len(losses), None if removed else 2.0)


def test_what_cannot_win_is_not_looked_at() -> None:
    table = Table(24)
    fast = FastSearch(table, error=0.05, steps=6)
    found: list[Step] = []

    def score(removed: Sequence[int], candidates: Sequence[int]) -> Scores:
        scores = fast.score(removed, candidates, found[-1].loss if found else None)
        for block, loss, exact in zip(candidates, scores.losses, scores.exact, strict=True):
            assert loss == table.loss([*removed, block]) or not exact
        return scores

    greedy(recorded(score, (), found.append), num_blocks=24, remove=6)
    asked = list(table.asked)
    exact = greedy(table.score, num_blocks=24, remove=6)
    assert [step.block for step in found] == [choice.block for choice in exact]
    assert asked[:2] == [22, 21]
    assert max(asked[2:]) <= 12


@pytest.mark.parametrize("screened", [False, True])
def test_on_a_model_the_fast_order_is_the_naive_one(models: Models, screened: bool) -> None:
    sequences = random_windows(6, 96)
    sweep = sweep_of(models("llama"), sequences)
    screen = sweep_of(models("llama"), sequences) if screened else None
    fast = FastSearch(sweep, error=0.05, steps=4, screen=screen)
    found: list[Step] = []

    def score(removed: Sequence[int], candidates: Sequence[int]) -> Scores:
        return fast.score(removed, candidates, found[-1].loss if found else None)

    greedy(recorded(score, (), found.append), num_blocks=8, remove=4)
    for step, (block, losses) in zip(
        found, oracle.naive_search(models("llama"), sequences, 4), strict=True
    ):
        assert step.block == block
        assert step.loss == pytest.approx(losses[block], rel=1e-5)
