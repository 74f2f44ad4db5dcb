"""The verdicts safe and harmful."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sleb_serve.evaluation.answers import ANSWER_LENGTH
from sleb_serve.evaluation.report import describe, recorded_verdict
from sleb_serve.evaluation.verdict import (
    HARMFUL_AGREEMENT,
    HARMFUL_ANSWERS,
    SAFE_AGREEMENT,
    SAFE_ANSWERS,
    verdict,
)
from sleb_serve.manifest.schema import Manifest, ModelBinding, Removal

MODEL = ModelBinding("m", None, "LlamaForCausalLM", 4, "0" * 64, "1" * 64)
MANIFEST = Manifest(MODEL, (Removal(2),))


def entry(blocks: int, same: list[float], accuracies: list[float]) -> dict[str, Any]:
    return {
        "blocks": blocks,
        "agreement": {str(i): share for i, share in enumerate(same)},
        "answers": {},
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


@pytest.mark.parametrize(
    ("tokens", "same", "expected"),
    [
        (0.27, [0.95], "safe"),
        (0.26, [0.95], "check"),
        (0.08, [0.95], "harmful"),
        (0.9, [], "check"),
    ],
)
def test_answers_count(tokens: float, same: list[float], expected: str) -> None:
    pruned = {**entry(2, same, [0.5]), "answers": {"whole": 0.0, "tokens": tokens}}
    assert verdict(pruned, [entry(0, [], [0.5]), pruned]) == expected


def test_without_the_dense_model_tasks_say_nothing_and_itself_has_no_verdict() -> None:
    pruned = entry(2, [], [0.1, 0.1])
    assert verdict(pruned, [pruned]) is None
    dense = entry(0, [], [0.5])
    assert verdict(dense, [dense]) is None


@pytest.mark.parametrize(
    "content",
    [
        {"results": 3},
        {"results": [{"blocks": 1, "perplexity": {"t": "low"}}]},
        {"results": [{"blocks": 1, "tasks": {"t": {}}}]},
        {"results": [{"blocks": 1, "tasks": {"t": {"acc_stderr": 1}}}]},
        {"results": [{"blocks": -1}]},
        [],
    ],
)
def test_show_passes_over_evaluations_of_others(content: Any) -> None:
    text = describe(replace(MANIFEST, evaluation={"hf": content}))
    assert text == describe(MANIFEST)


def test_show_keeps_the_names_of_an_evaluation_off_the_terminal() -> None:
    agreement = {"a\x1b[2J": 0.5, "b": 0.6}
    found = {"blocks": 1, "perplexity": dict.fromkeys(agreement, 9.0), "agreement": agreement}
    text = describe(
        replace(MANIFEST, evaluation={"hf": {"results": [found]}, "\x1b": {"results": [found]}})
    )
    assert "\x1b" not in text
    assert text.count("evaluated    harmful: 1 removed (hf): perplexity 9.00 on b, 60.0%") == 1


def test_a_manifests_verdict_is_the_worst_that_it_holds_of_so_many_blocks() -> None:
    def found(same: float, blocks: int = 1) -> dict[str, Any]:
        perplexity = {"a": 9.0}
        return {"blocks": blocks, "perplexity": perplexity, "agreement": {"a": same}}

    evaluation = {
        "hf": {"results": [found(0.8), found(0.5, blocks=2)]},
        "vllm": {"results": [found(0.6)]},
        "other": {"results": 3},
    }
    manifest = replace(MANIFEST, evaluation=evaluation)
    assert [recorded_verdict(manifest, blocks) for blocks in (1, 2, 3)] == [*["harmful"] * 2, None]
    assert recorded_verdict(replace(MANIFEST, evaluation={"hf": evaluation["hf"]}), 1) == "check"
    assert recorded_verdict(MANIFEST, 1) is None


def test_the_limits_of_answers_are_those_of_agreement() -> None:
    for agreement, answers in (
        (SAFE_AGREEMENT, SAFE_ANSWERS),
        (HARMFUL_AGREEMENT, HARMFUL_ANSWERS),
    ):
        powers = [agreement**n for n in range(1, ANSWER_LENGTH + 1)]
        assert sum(powers) / len(powers) == pytest.approx(answers, abs=0.005)
