"""Proof of pruning: the ranks' reports against the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.errors import SlebError
from sleb_serve.manifest.built import check_ranks
from sleb_serve.manifest.pruning import Pruning
from sleb_serve.manifest.tensors import ShorterTensors

PRUNING = Pruning("LlamaForCausalLM", 6, "0" * 64, "1" * 64, (2, 3))


def rank(number: int, layers: list[int], digest: str = PRUNING.digest) -> dict[str, Any]:
    return {"rank": number, "digest": digest, "layers": layers}


def test_tensor_and_pipeline_ranks_that_hold_what_is_left_pass() -> None:
    check_ranks(PRUNING, [rank(0, [0, 1, 4, 5]), rank(1, [0, 1, 4, 5])])
    check_ranks(PRUNING, [rank(0, [0, 1]), rank(1, [4, 5])])


@pytest.mark.parametrize(
    ("reports", "message"),
    [
        ([rank(0, [0, 1, 4])], "hold decoder layers"),
        ([rank(0, [0, 1, 2, 4, 5])], "hold decoder layers"),
        ([rank(0, [0, 1, 4, 5]), None], "rank 1 serves no pruned model"),
        (
            [rank(0, [0, 1, 4, 5]), rank(1, [0, 1, 4, 5], "f" * 64)],
            "rank 1 holds manifest ffffffff",
        ),
    ],
)
def test_ranks_that_differ_are_refused(reports: list[Any], message: str) -> None:
    with pytest.raises(SlebError, match=message):
        check_ranks(PRUNING, reports)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Six blocks with a weight each, and one outside."""
    names = ["model.embed.weight", *(f"model.layers.{block}.w" for block in range(6))]
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "model.safetensors")
    return Checkpoint(tmp_path, {"num_hidden_layers": 6})


def tensors(*blocks: int) -> list[tuple[str, Any]]:
    named = [("model.embed.weight", 0), *((f"model.layers.{b}.w", b) for b in blocks)]
    return [(name, torch.full((2,), float(value))) for name, value in named]


def test_weights_of_removed_blocks_are_left_out_the_others_renumbered_and_none_may_be_missing(
    checkpoint: Checkpoint,
) -> None:
    shorter = ShorterTensors(checkpoint, PRUNING)
    found = [(name, int(tensor[0])) for name, tensor in shorter(tensors(0, 1, 2, 3, 4, 5))]
    assert found == [
        ("model.embed.weight", 0),
        ("model.layers.0.w", 0),
        ("model.layers.1.w", 1),
        ("model.layers.2.w", 4),
        ("model.layers.3.w", 5),
    ]
    shorter.check()

    shorter = ShorterTensors(checkpoint, PRUNING)
    list(shorter(tensors(0, 4)))
    with pytest.raises(SlebError, match=r"no tensor of blocks \[1, 5\]"):
        shorter.check()
