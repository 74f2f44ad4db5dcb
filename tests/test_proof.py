"""The proof that pruning is live: what ranks report is held against the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sleb_vllm.proof import Watched, check_ranks

from sleb_serve.checkpoint import Checkpoint
from sleb_serve.errors import SlebError
from sleb_serve.pruning import Pruning

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


def names(*blocks: int) -> list[tuple[str, None]]:
    return [("model.embed.weight", None), *((f"model.layers.{b}.w", None) for b in blocks)]


def test_weights_of_removed_blocks_must_not_come_and_those_of_kept_ones_must() -> None:
    checkpoint = Checkpoint(Path("m"), {"num_hidden_layers": 6})
    watched = Watched(checkpoint, PRUNING)
    assert list(watched.watch(names(0, 1, 4, 5))) == names(0, 1, 4, 5)
    watched.check()

    watched = Watched(checkpoint, PRUNING)
    with pytest.raises(SlebError, match=r"vLLM read model\.layers\.3\.w of removed block 3"):
        list(watched.watch(names(0, 3)))

    watched = Watched(checkpoint, PRUNING)
    list(watched.watch(names(0, 4)))
    with pytest.raises(SlebError, match=r"no tensor of blocks \[1, 5\]"):
        watched.check()
