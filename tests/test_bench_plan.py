"""The roofline plan against published numbers and manual arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sleb_serve.cli.main import main
from sleb_serve.roofline.gpu import GPUS, Gpu
from sleb_serve.roofline.model import MODELS, Block, Cache, Model
from sleb_serve.roofline.plan import plan, predict
from sleb_serve.roofline.step import Roofline

# The number of parameters each model's paper gives, in billions.
PUBLISHED = {"llama-2-7b": 6.74, "llama-2-13b": 13.02, "llama-2-70b": 68.98, "llama-3-8b": 8.03}


@pytest.mark.parametrize(("name", "billions"), PUBLISHED.items())
def test_known_models_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    assert MODELS[name].parameters / 1e9 == pytest.approx(billions, rel=2e-3)


def model(*blocks: Block) -> Model:
    """Hidden states of 4 numbers, a head of 40."""
    return Model("m", blocks, 4, 2, 10, 40, 80)


def test_a_step_is_bound_by_what_takes_longer() -> None:
    # A block: 144 parameters in 288 bytes; 8 bytes of KV cache a token, queries of 4 numbers.
    small = model(*[Block(144, 288, Cache(token=8, width=4))] * 2)
    slow_memory = Gpu("m", 1e9, 1.0, 1e3, 1.0, 0.0)
    found = Roofline(small, slow_memory)(1, 1, 5, 5)
    assert found == pytest.approx(2 * (144 * 2 + 5 * 8) + 40 * 2)
    slow_arithmetic = Gpu("a", 1.0, 1e9, 1e3, 1.0, 0.0)
    found = Roofline(small, slow_arithmetic)(3, 1, 15, 5)
    assert found == pytest.approx(2 * (2 * 3 * 144 + 4 * 3 * 5 * 4) + 2 * 40)
    # Two ranks halve both, and exchange 2 * (1/2) of 3 tokens * 4 numbers * 2 bytes, twice a block.
    link = Gpu("l", 1.0, 1e9, 1e3, 2.0, 0.5)
    two = Roofline(small, link, 2)(3, 1, 15, 5)
    assert two == pytest.approx(found / 2 + 2 * 2 * (2 * 0.5 * 24 / 2.0 + 0.5))
    # One after another, as Transformers spreads a model, they are as slow as one.
    assert Roofline(small, link, 2, split="layers")(3, 1, 15, 5) == pytest.approx(found)
    # Without one of the two blocks, half of them is left.
    assert Roofline(small, slow_memory, removed=1)(1, 1, 5, 5) == pytest.approx(328 + 80)


def test_each_kind_of_block_reads_what_it_needs() -> None:
    gpu = Gpu("m", 1e12, 1.0, 1e3, 1.0, 0.0)
    head, sequences, context = 80, 3, 50

    def read(block: Block) -> float:
        step = Roofline(model(block), gpu)
        return step(sequences, sequences, sequences * context, sequences * context) - head

    assert read(Block(1, 100, Cache(token=2))) == pytest.approx(100 + 3 * 50 * 2)
    assert read(Block(1, 100, Cache(token=2, window=20))) == pytest.approx(100 + 3 * 20 * 2)
    # A state is read and written whole.
    assert read(Block(1, 100, Cache(state=7))) == pytest.approx(100 + 3 * 2 * 7)
    # Of 4 experts each of 3 tokens takes one.
    routed = Block(1, 100, Cache(), 4, 1, 1, 64)
    assert read(routed) == pytest.approx(100 + 64 * 4 * (1 - (3 / 4) ** 3))


def test_the_papers_ratios_are_met_within_two_percent() -> None:
    _, paper = plan(MODELS["llama-2-70b"], GPUS["A100-80G"], 2, [16])
    assert paper is not None
    assert paper["prompt_ms"]["ratio_paper"] == pytest.approx(1364.1 / 1718.4)
    assert paper["tokens_s"]["ratio_paper"] == pytest.approx(381 / 299)
    assert abs(paper["prompt_ms"]["ratio_error"]) < 0.02
    assert abs(paper["tokens_s"]["ratio_error"]) < 0.021
    # A roofline is a bound: nobody measured faster than it.
    assert all(error < 0 for error in paper["prompt_ms"]["errors"])
    assert all(error > 0 for error in paper["tokens_s"]["errors"])


def test_pruning_leaves_more_for_the_kv_cache() -> None:
    whole, gpu = MODELS["llama-2-70b"], GPUS["A100-80G"]
    dense, pruned = predict(whole, gpu, 2, 0), predict(whole, gpu, 2, 16)
    freed = dense.weights - pruned.weights
    assert freed == pytest.approx(16 * whole.blocks[0].parameters * 2)
    assert pruned.kv_tokens > dense.kv_tokens * 80 / 64
    assert predict(whole, gpu, 1, 0).kv_tokens == 0  # 138 GB on one card of 80


def test_the_command_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpu", "A100-80G", "-tp", "2"]) == 0
    text = capsys.readouterr().out
    for part in ("llama-2-70b on 2 x A100-80G", "1718.4", "1364.1", "299.0", "381.0"):
        assert part in text
    arguments = ["plan", "llama-2-7b", "--removed", "4", "--json"]
    assert main(arguments) == 0
    values = json.loads(capsys.readouterr().out)
    assert [p["removed"] for p in values["predictions"]] == [0, 4]
    assert values["paper"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "A101"], "--gpu A101 is not one of A100-40G"),
        (["-tp", "3"], "--tensor-parallel-size 3: llama-2-70b has 64 heads"),
        (["-tp", "0"], "--tensor-parallel-size 0"),
        (["--removed", "80"], "--removed 80: llama-2-70b has 80 blocks"),
        (["--removed", "few"], "few: give whole numbers"),
        (["--memory-efficiency", "0"], "--memory-efficiency is above 0"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_kind_of_model_that_is_not_known_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"model_type": "unheard-of", "architectures": ["None"], "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(tmp_path / "config.json")]) == 2
    error = capsys.readouterr().err
    assert "Transformers does not know this kind of model" in error
    assert "give a folder or a hub id with the safetensors files" in error


def test_what_a_benchmark_lacks_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 2
    error = capsys.readouterr().err
    assert "required: MODEL" in error
