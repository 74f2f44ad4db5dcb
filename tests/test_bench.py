"""The paired benchmark: the report's arithmetic, and one real run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import oracle
from sleb_bench.report import geometric_mean_interval, ideal_ratio, make_report, to_markdown
from sleb_serve.cli import main

Models = Callable[[str], Path]


def records() -> list[dict[str, Any]]:
    """A run of two rounds with round numbers: decode gains 1.2 and 1.3, prefill 1.25 twice."""
    setting = {
        "record": "setting",
        "model": "m",
        "pruning": {"num_blocks": 10, "removed": [3, 4]},
        "pruning_digest": "0" * 64,
        "options": {
            "starts": 1,
            "rounds": 2,
            "prompt_length": 100,
            "batch": 4,
            "output_length": 11,
        },
        "quality_text": "some text",
        "head_share": 0.5,
        "machine": {"cpu": "a cpu", "cores": 2},
    }
    engines = [
        {"record": "engine", "variant": name, "kv_cache_tokens": tokens, "vllm": "1", "torch": "2"}
        for name, tokens in (("dense", 1000), ("pruned", 1250))
    ]
    quality = [
        {"record": "quality", "variant": "dense", "loss": 2.0},
        {"record": "quality", "variant": "pruned", "loss": 3.0},
    ]
    times = {
        ("prefill", "dense"): (9.0, 2.0, 1.0),
        ("prefill", "pruned"): (1.0, 1.6, 0.8),
        ("decode", "dense"): (9.0, 1.2, 2.6),
        ("decode", "pruned"): (1.0, 1.0, 2.0),
    }
    samples = [
        {
            "record": "sample",
            "workload": workload,
            "variant": variant,
            "start": 1,
            "round": number,
            "elapsed_time": elapsed,
            "num_requests": 4,
            "total_input_tokens": 400 if workload == "prefill" else 64,
            "total_output_tokens": 4 if workload == "prefill" else 44,
        }
        for (workload, variant), values in times.items()
        for number, elapsed in enumerate(values)
    ]
    return [setting, *engines, *quality, *samples]


def test_the_report_is_what_a_pocket_calculator_says() -> None:
    report = make_report(records())
    prefill, decode = report["workloads"]["prefill"], report["workloads"]["decode"]
    assert prefill["dense"] == pytest.approx((400 / 2 + 400 / 1) / 2)
    assert prefill["ratio_rounds"] == [pytest.approx([1.25, 1.25])]
    assert prefill["ratio"] == pytest.approx(1.25)
    assert prefill["ideal"] == pytest.approx(10 / 8)
    assert prefill["efficiency"] == pytest.approx(1.0)
    # 4 sequences of 11 tokens: the first of each came with the prefill.
    assert decode["pruned"] == pytest.approx((40 / 1.0 + 40 / 2.0) / 2)
    assert decode["ratio_rounds"] == [pytest.approx([1.2, 1.3])]
    assert decode["ratio"] == pytest.approx(math.sqrt(1.2 * 1.3))
    assert decode["ideal"] == pytest.approx(1 / 0.9)
    assert report["perplexity"] == pytest.approx({"dense": math.e**2, "pruned": math.e**3})


def test_the_warm_up_is_left_out() -> None:
    kept = [r for r in records() if r.get("round") != 0]
    assert make_report(kept) == make_report(records())


def test_the_markdown_has_every_number_of_the_table() -> None:
    text = to_markdown(make_report(records()))
    for part in ("300.0", "375.0", "1.250", "1.111", "100 %", "1000", "7.39", "20.09", "a cpu"):
        assert part in text


def test_the_ideal_ratio_is_the_papers_for_a_model_without_a_head() -> None:
    assert ideal_ratio(80, 16, 0.0) == pytest.approx(1.25)
    assert ideal_ratio(30, 6, 1.0) == 1.0


def test_the_interval_holds_the_mean_and_shrinks_with_agreement() -> None:
    ratios = [1.1, 1.2, 1.3, 1.2, 1.1]
    low, high = geometric_mean_interval([ratios])
    assert 1.1 <= low < math.exp(sum(map(math.log, ratios)) / 5) < high <= 1.3
    assert geometric_mean_interval([[1.2] * 4]) == pytest.approx((1.2, 1.2))


def test_starts_that_disagree_widen_the_interval_though_rounds_agree() -> None:
    low, high = geometric_mean_interval([[1.1] * 3, [1.4] * 3, [1.25] * 3])
    assert low == pytest.approx(1.1)
    assert high == pytest.approx(1.4)


def test_a_real_run_writes_records_and_both_reports(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("vllm")
    from sleb_serve.calibration import held_out_windows
    from sleb_serve.checkpoint import open_checkpoint
    from sleb_serve.manifest import read_manifest
    from sleb_serve.select import load_tokenizer

    path, manifest, out = models("llama"), tmp_path / "m.json", tmp_path / "out"
    select = ["select", str(path), "-o", str(manifest), "--remove", "2"]
    text = ["--calibration", "python-docs", "--sequences", "2", "--sequence-length", "32"]
    assert main([*select, *text]) == 0
    small = [
        "--starts",
        "2",
        "--rounds",
        "1",
        "--prompt-length",
        "64",
        "--batch",
        "2",
        "--output-length",
        "8",
    ]
    engine = ["--engine-args", '{"enforce_eager": true, "dtype": "float32"}']
    arguments = ["bench", str(path), "-m", str(manifest), "-o", str(out), *small, *engine]
    assert main([*arguments, "--perplexity-windows", "3"]) == 0
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith((out / "report.md").read_text().rstrip())

    raw = [json.loads(line) for line in (out / "records.jsonl").open()]
    report = json.loads((out / "report.json").read_text())
    assert json.loads(json.dumps(make_report(raw))) == report
    samples = [record for record in raw if record["record"] == "sample"]
    assert len(samples) == 2 * 2 * 2 * 2  # starts, rounds with the warm-up, workloads, variants
    for sample in samples:
        expected = (4, 256, 4) if sample["workload"] == "prefill" else (2, 32, 16)
        found = ("num_requests", "total_input_tokens", "total_output_tokens")
        assert tuple(sample[key] for key in found) == expected
        assert sample["elapsed_time"] > 0
    tokens = {r["variant"]: r["kv_cache_tokens"] for r in raw if r["record"] == "engine"}
    assert tokens["pruned"] / tokens["dense"] == pytest.approx(8 / 6, rel=0.01)

    windows = held_out_windows(load_tokenizer(open_checkpoint(str(path))), 3, 64, None)
    losses = {r["variant"]: r["loss"] for r in raw if r["record"] == "quality"}
    assert losses["dense"] == pytest.approx(oracle.loss(oracle.load(path), windows), rel=1e-4)
    pruned = oracle.pruned(path, read_manifest(manifest).blocks)
    assert losses["pruned"] == pytest.approx(oracle.loss(pruned, windows), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--starts", "0"], "--starts must be at least 1"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--output-length", "1"], "--output-length must be at least 2"),
        (["--engine-args", "{"], "not JSON"),
        (["--engine-args", "[]"], "must be an object"),
    ],
)
def test_bad_options_are_refused(
    models: Models,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    from sleb_serve.binding import bind
    from sleb_serve.checkpoint import open_checkpoint
    from sleb_serve.manifest import Manifest, Removal

    path = str(models("llama"))
    Manifest(bind(path, open_checkpoint(path)), (Removal(3),)).write(tmp_path / "m.json")
    out = tmp_path / "out"
    assert main(["bench", path, "-m", str(tmp_path / "m.json"), "-o", str(out), *options]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_an_engine_that_does_not_start_ends_the_benchmark(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("vllm")
    from sleb_serve.binding import bind
    from sleb_serve.checkpoint import open_checkpoint
    from sleb_serve.manifest import Manifest, Removal

    path = str(models("llama"))
    Manifest(bind(path, open_checkpoint(path)), (Removal(3),)).write(tmp_path / "m.json")
    out = tmp_path / "out"
    arguments = ["bench", path, "-m", str(tmp_path / "m.json"), "-o", str(out)]
    assert main([*arguments, "--engine-args", '{"max_model_len": 4096}']) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("sleb-serve: error: the dense engine failed: ")
    assert "max_model_len" in error
    assert not (out / "report.json").exists()
