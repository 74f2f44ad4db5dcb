"""The layer sweep against the whole model run once per candidate, its block deleted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import oracle
from sleb_serve.checkpoint import open_checkpoint
from sleb_serve.errors import SlebError
from sleb_serve.scoring import LayerSweep, decoder_layers, load_model
from sleb_serve.selection import Step, greedy
from tiny import VOCABULARY

Models = Callable[[str], Path]


def random_windows(count: int, length: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count, length), generator=generator).tolist()


def search(path: Path, windows: list[list[int]], remove: int, **barriers: int) -> tuple[Step, ...]:
    model = load_model(open_checkpoint(str(path)), "float32")
    sweep = LayerSweep(model, windows)
    return greedy(sweep.score, num_blocks=len(sweep.layers), remove=remove, **barriers)


@pytest.mark.parametrize(
    ("name", "remove", "barriers"),
    [
        ("llama", 5, {}),
        ("llama", 7, {"early_barrier": 0, "late_barrier": 0}),
        ("opt", 4, {}),
        ("opt", 3, {"early_barrier": 2, "late_barrier": 0}),
        ("mistral", 2, {}),
        ("qwen2", 2, {}),
        ("gemma3", 2, {}),
        ("gpt2", 2, {}),
        ("bloom", 2, {}),
    ],
)
def test_order_and_every_loss_equal_the_naive_search(
    models: Models, name: str, remove: int, barriers: dict[str, int]
) -> None:
    windows = random_windows(3, 48)
    steps = search(models(name), windows, remove, **barriers)
    naive = oracle.naive_search(
        models(name),
        windows,
        remove,
        barriers.get("early_barrier", 1),
        barriers.get("late_barrier", 1),
    )
    for step, (block, losses) in zip(steps, naive, strict=True):
        assert step.block == block
        assert step.candidates == tuple(losses)
        assert step.losses == pytest.approx(list(losses.values()), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "opt", "gemma3", "bloom"])
def test_the_base_is_scored_with_the_candidates(models: Models, name: str) -> None:
    windows = random_windows(2, 40)
    model = load_model(open_checkpoint(str(models(name))), "float32")
    sweep = LayerSweep(model, windows)
    dense, one, two = sweep.score([], [1, 2], base=True)
    assert dense == pytest.approx(oracle.loss(oracle.load(models(name)), windows), rel=1e-5)
    assert [one, two] == pytest.approx(sweep.score([], [1, 2]), rel=1e-5)
    (pair,) = sweep.score([1, 2], [], base=True)
    expected = oracle.loss(oracle.pruned(models(name), [1, 2]), windows)
    assert pair == pytest.approx(expected, rel=1e-5)


def test_the_model_is_left_as_it_was(models: Models) -> None:
    model = load_model(open_checkpoint(str(models("llama"))), "float32")
    tokens = torch.tensor(random_windows(1, 30))
    before = model(tokens).logits
    sweep = LayerSweep(model, random_windows(2, 30))
    sweep.score([2], [1, 3])
    assert torch.equal(model(tokens).logits, before)
    assert all("forward" not in layer.__dict__ for layer in decoder_layers(model))


def test_layers_that_do_not_broadcast_are_run_state_by_state(models: Models) -> None:
    windows = random_windows(1, 30)
    batches = {
        name: LayerSweep(
            load_model(open_checkpoint(str(models(name))), "float32"), windows
        )._batches
        for name in ("llama", "bloom")
    }
    assert batches == {"llama": True, "bloom": False}


def test_tokens_beyond_the_vocabulary_are_refused(models: Models) -> None:
    model = load_model(open_checkpoint(str(models("llama"))), "float32")
    with pytest.raises(SlebError, match="beyond the model's vocabulary"):
        LayerSweep(model, [[1, 2, VOCABULARY]])


def test_on_smollm2_the_sweeps_order_is_the_naive_one(smollm2: Path) -> None:
    from sleb_serve.calibration import make_windows
    from sleb_serve.select import load_tokenizer

    windows = make_windows(
        "python-docs",
        load_tokenizer(open_checkpoint(str(smollm2))),
        sequences=4,
        sequence_length=256,
    ).tokens
    steps = search(smollm2, [list(window) for window in windows], 2)
    naive = oracle.naive_search(smollm2, windows, 2)
    for step, (block, losses) in zip(steps, naive, strict=True):
        assert step.block == block
        assert step.losses == pytest.approx(list(losses.values()), rel=1e-5)
