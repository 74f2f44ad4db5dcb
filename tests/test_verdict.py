"""When a pruning is called safe, and when harmful."""

from __future__ import annotations

from typing import Any

import pytest

from sleb_serve.evaluation.verdict import verdict


def entry(blocks: int, same: list[float], accuracies: list[float]) -> dict[str, Any]:
    return {
        "blocks": blocks,
        "agreement": {str(i): share for i, share in enumerate(same)},
        "tasks": {f"t{i}": {"acc": a, "acc_stderr": 0.01} for i, a in enumerate(accuracies)},
    }


@pytest.mark.parametrize(
    ("same", "accuracies", "expected"),
    [
        ([0.95, 0.9], [0.49, 0.51], "safe"),
        ([0.95, 0.89], [0.5, 0.5], "check"),
        ([0.95], [0.47, 0.5], "check"),
        ([0.95], [0.3, 0.55], "harmful"),
        ([0.99, 0.74], [0.5, 0.5], "harmful"),
        ([0.0], [0.5, 0.5], "harmful"),
        ([0.99], [], "check"),
        ([0.5], [], "harmful"),
        ([], [0.5, 0.5], "check"),
        ([], [0.4, 0.4], "harmful"),
        ([], [], None),
    ],
)
def test_limits(same: list[float], accuracies: list[float], expected: str | None) -> None:
    pruned = entry(2, same, accuracies)
    assert verdict(pruned, [entry(0, [], [0.5, 0.5]), pruned]) == expected


def test_without_the_dense_model_tasks_say_nothing_and_itself_has_no_verdict() -> None:
    pruned = entry(2, [], [0.1, 0.1])
    assert verdict(pruned, [pruned]) is None
    dense = entry(0, [], [0.5])
    assert verdict(dense, [dense]) is None
