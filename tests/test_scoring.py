"""The layer sweep against the whole model run once per candidate, its block deleted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from conftest import Models
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.cut.layers import decoder_layers
from sleb_serve.errors import SlebError
from sleb_serve.models.layerwise import CausalLM
from sleb_serve.models.loading import load_model
from sleb_serve.selection.layer_sweep import LayerSweep
from sleb_serve.selection.memory import Needs, Plan, make_plan, peak_bytes
from sleb_serve.selection.search import Step
from sleb_serve.utils.sizes import parse_size
from sweeps import greedy_steps, random_windows, search, sweep_of
from tiny import VOCABULARY


def check(steps: Sequence[Step], naive: Sequence[tuple[int, dict[int, float]]]) -> None:
    """The same order; each exact loss equal, each other one a bound that lost fairly."""
    for step, (block, losses) in zip(steps, naive, strict=True):
        assert step.block == block
        assert step.candidates == tuple(losses)
        assert step.exact[step.candidates.index(block)]
        for candidate, loss, exact in zip(step.candidates, step.losses, step.exact, strict=True):
            if exact:
                assert loss == pytest.approx(losses[candidate], rel=1e-5)
            else:
                assert step.loss < loss <= losses[candidate] * (1 + 1e-5)


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
    sequences = random_windows(3, 48)
    steps = search(models(name), sequences, remove, **barriers)
    naive = oracle.naive_search(
        models(name),
        sequences,
        remove,
        barriers.get("early_barrier", 1),
        barriers.get("late_barrier", 1),
    )
    check(steps, naive)


@pytest.mark.parametrize("name", ["llama", "opt", "gemma3", "bloom"])
def test_the_base_is_scored_with_the_candidates(models: Models, name: str) -> None:
    sequences = random_windows(2, 40)
    sweep = sweep_of(models(name), sequences)
    dense = oracle.loss(oracle.load(models(name)), sequences)
    assert sweep.score([], [1, 2]).base == pytest.approx(dense, rel=1e-5)
    expected = oracle.loss(oracle.pruned(models(name), [1, 2]), sequences)
    assert sweep.loss([1, 2]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom", "gemma2", "granite"])
def test_with_layers_on_disk_the_losses_are_the_same(models: Models, name: str) -> None:
    sequences = random_windows(3, 40)
    resident, streamed = (
        greedy_steps(
            (sweep := sweep_of(models(name), sequences, streamed=on_disk)).score,
            num_blocks=len(sweep.model.layers),
            remove=2,
        )
        for on_disk in (False, True)
    )
    assert streamed == resident
    check(streamed, oracle.naive_search(models(name), sequences, 2))


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("snapshots", [0, 12, 40, 1000])
def test_however_the_work_is_cut_the_result_is_the_same(
    models: Models, chunk: int, snapshots: int
) -> None:
    sequences = random_windows(3, 40)
    naive = oracle.naive_search(models("llama"), sequences, 5)
    sweep = sweep_of(models("llama"), sequences)
    for at_once, finals in ((1, 2), (2, 3), (3, 8)):
        sweep.plan = Plan(at_once, chunk, snapshots, finals)
        check(greedy_steps(sweep.score, num_blocks=8, remove=5), naive)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_the_divergence_from_the_dense_model_is_torchs(models: Models, name: str) -> None:
    """Every candidate's, against torch's own divergence of whole predictions."""
    sequences = random_windows(3, 40)
    sweep = sweep_of(models(name), sequences, objective="kl")
    scores = sweep.score([1], [2, 3, 4])
    dense = oracle.load(models(name))
    for block, found in zip([2, 3, 4], scores.losses, strict=True):
        model = oracle.pruned(models(name), [1, block])
        divergences = [oracle.divergence(dense, model, sequence) for sequence in sequences]
        assert found == pytest.approx(sum(divergences) / 3, rel=1e-4)
    assert scores.exact == (True,) * 3
    assert sweep.loss(()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("least", [2, 4])
def test_as_many_of_the_least_as_are_asked_for_are_exact(models: Models, least: int) -> None:
    sequences = random_windows(3, 48)
    sweep = sweep_of(models("llama"), sequences)
    scores = sweep.score([], range(1, 7), least=least)
    (_, losses) = oracle.naive_search(models("llama"), sequences, 1)[0]
    best = sorted(losses, key=lambda block: losses[block])[:least]
    assert [block for block in best if not scores.exact[block - 1]] == []
    for block in best:
        assert scores.losses[block - 1] == pytest.approx(losses[block], rel=1e-5)


def test_the_model_is_left_as_it_was(models: Models) -> None:
    model: Any = load_model(open_checkpoint(str(models("llama"))), "float32")
    tokens = torch.tensor(random_windows(1, 30))
    before = model(tokens).logits
    sweep = LayerSweep(CausalLM(model, random_windows(1, 30)[0]), random_windows(2, 30))
    sweep.score([2], [1, 3])
    assert torch.equal(model(tokens).logits, before)
    assert all("forward" not in layer.__dict__ for layer in decoder_layers(model))
    assert "forward" not in model.lm_head.__dict__


def test_layers_that_do_not_broadcast_are_run_state_by_state(models: Models) -> None:
    sequences = random_windows(1, 30)
    batches = {name: sweep_of(models(name), sequences).model.batches for name in ("llama", "bloom")}
    assert batches == {"llama": True, "bloom": False}


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2 << 30), ("1.5G", 3 << 29), ("800M", 800 << 20), ("64 kb", 65536), ("123", 123)],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1G", "2X", "much", "nan"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(SlebError, match="memory_budget"):
        parse_size(text)


@given(
    budget=st.integers(1, 10**8),
    weights=st.integers(0, 10**6),
    state=st.integers(1, 10**4),
    layer=st.integers(1, 10**5),
    sequences=st.integers(1, 20),
    forks=st.integers(1, 40),
    streamed=st.booleans(),
)
def test_a_plan_never_holds_more_than_the_budget(
    budget: int, weights: int, state: int, layer: int, sequences: int, forks: int, streamed: bool
) -> None:
    needs = Needs(weights, state, layer, layer // 2)
    try:
        plan = make_plan(
            budget, needs, sequences=sequences, forks=forks, best_chunk=8, streamed=streamed
        )
    except SlebError:
        # What must fit: the weights, one sequence's states, the work on one, two finalists.
        assert (
            weights + (forks + 2 + 2 * sequences) * state + layer > 0.85 * budget - (40 << 20) - 1
        )
        return
    held = weights + plan.sequences * (forks + 2) * state + plan.chunk * layer
    held += (plan.finals * sequences + plan.snapshots) * state
    assert held <= budget
    assert min(plan.sequences, plan.chunk, plan.finals - 1) >= 1


def test_the_most_that_tensors_hold_is_told() -> None:
    given = torch.zeros(1000)

    def work() -> None:
        first = given + 1  # 4,000 bytes
        second = torch.cat([first, first])  # 8,000 more
        del first
        second[:10].add(1)  # 40 more, 4,000 less

    assert peak_bytes(work) == 12_000


def test_tokens_beyond_the_vocabulary_are_refused(models: Models) -> None:
    with pytest.raises(SlebError, match="beyond the model's vocabulary"):
        sweep_of(models("llama"), [[1, 2, VOCABULARY - 1], [1, 2, VOCABULARY]])


@pytest.mark.slow
def test_on_smollm2_the_sweeps_order_is_the_naive_one(smollm2: Path) -> None:
    from sleb_serve.data.calibration import make_sequences
    from sleb_serve.data.tokenizer import load_tokenizer

    sequences = make_sequences(
        "python-docs",
        load_tokenizer(open_checkpoint(str(smollm2))),
        sequences=1,
        sequence_length=32,
    ).tokens
    steps = search(smollm2, [list(sequence) for sequence in sequences], 2)
    naive = oracle.naive_search(smollm2, sequences, 2)
    check(steps, naive)
