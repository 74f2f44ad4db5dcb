"""The roofline plan against figures that were published, and against arithmetic by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sleb_serve.cli.main import main
from sleb_serve.roofline.plan import GPUS, SHAPES, Gpu, Shape, plan, predict, shape_of, step_time
from tiny import make_config

# The number of parameters each model's paper gives, in billions.
PUBLISHED = {"llama-2-7b": 6.74, "llama-2-13b": 13.02, "llama-2-70b": 68.98, "llama-3-8b": 8.03}


@pytest.mark.parametrize(("name", "billions"), PUBLISHED.items())
def test_shapes_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    shape = SHAPES[name]
    total = shape.num_blocks * shape.block_parameters + 2 * shape.hidden * shape.vocabulary
    assert total / 1e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt"])
def test_a_block_is_as_large_as_transformers_makes_it(name: str) -> None:
    from transformers import AutoModelForCausalLM

    config = make_config(name)
    model = AutoModelForCausalLM.from_config(config)
    layers = model.get_decoder().layers
    matrices = sum(p.numel() for p in layers[0].parameters() if p.ndim > 1)
    shape = shape_of(json.loads(config.to_json_string(use_diff=False)), name)
    assert shape.num_blocks == len(layers)
    assert shape.block_parameters == matrices


def test_a_step_is_bound_by_what_takes_longer() -> None:
    shape = Shape("s", 2, 4, 2, 1, 2, 8, 10)
    # A block: 4*2*2*(2+1) + 3*4*8 = 144 parameters; 8 bytes of KV cache a token; a head of 40.
    assert (shape.block_parameters, shape.kv_bytes) == (144, 8)
    slow_memory = Gpu("m", 1e9, 1.0, 1e3, 1.0, 0.0)
    found = step_time(shape, slow_memory, 1, blocks=2, new=1, context=5, sequences=1)
    assert found == pytest.approx(2 * (144 * 2 + 5 * 8) + 40 * 2)
    slow_arithmetic = Gpu("a", 1.0, 1e9, 1e3, 1.0, 0.0)
    found = step_time(shape, slow_arithmetic, 1, blocks=2, new=3, context=5, sequences=1)
    assert found == pytest.approx(2 * (2 * 3 * 144 + 4 * 3 * 5 * 4) + 2 * 40)
    # Two ranks halve both, and exchange 2 * (1/2) of 3 tokens * 4 numbers * 2 bytes, twice a block.
    link = Gpu("l", 1.0, 1e9, 1e3, 2.0, 0.5)
    two = step_time(shape, link, 2, blocks=2, new=3, context=5, sequences=1)
    assert two == pytest.approx(found / 2 + 2 * 2 * (2 * 0.5 * 24 / 2.0 + 0.5))


def test_the_papers_ratios_are_met_within_two_percent() -> None:
    _, paper = plan(SHAPES["llama-2-70b"], GPUS["A100-80G"], 2, [16])
    assert paper is not None
    assert paper["prompt_ms"]["ratio_paper"] == pytest.approx(1364.1 / 1718.4)
    assert paper["tokens_s"]["ratio_paper"] == pytest.approx(381 / 299)
    assert abs(paper["prompt_ms"]["ratio_error"]) < 0.02
    assert abs(paper["tokens_s"]["ratio_error"]) < 0.021
    # A roofline is a bound: nobody measured faster than it.
    assert all(error < 0 for error in paper["prompt_ms"]["errors"])
    assert all(error > 0 for error in paper["tokens_s"]["errors"])


def test_pruning_leaves_more_for_the_kv_cache() -> None:
    shape, gpu = SHAPES["llama-2-70b"], GPUS["A100-80G"]
    dense, pruned = predict(shape, gpu, 2, 0), predict(shape, gpu, 2, 16)
    freed = dense.weights - pruned.weights
    assert freed == 16 * shape.block_parameters * 2
    assert pruned.kv_tokens > dense.kv_tokens * 80 / 64
    assert predict(shape, gpu, 1, 0).kv_tokens == 0  # 138 GB on one card of 80


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
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    assert main(["plan", str(tmp_path / "config.json")]) == 2
    assert "no plan for model type mamba" in capsys.readouterr().err


def test_what_a_benchmark_lacks_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 2
    error = capsys.readouterr().err
    assert "required: MODEL" in error
