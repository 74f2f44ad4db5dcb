"""The paired benchmark: the report's arithmetic, and one real run."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import oracle
from engines import forks
from sleb_bench.compare import compare, comparison
from sleb_bench.files import write_report
from sleb_bench.markdown import to_markdown
from sleb_bench.ratios import efficiency, line_fit, paired_ratio, t95
from sleb_bench.report import make_report
from sleb_serve.cli.main import main
from sleb_serve.roofline.ideal import ideal_ratio

Models = Callable[[str], Path]


def variant(name: str, blocks: int, over: str | None = "dense") -> dict[str, Any]:
    return {
        "record": "variant",
        "variant": name,
        "blocks": blocks,
        "over": over,
        "backend": "vllm",
        "pruning_digest": "0" * 64 if blocks else None,
        "weights_bytes": 1000 - 50 * blocks,
    }


def records(pruned_decode: tuple[float, ...] = (1.0, 1.0, 2.0)) -> list[dict[str, Any]]:
    """A run of two rounds with round numbers: decode gains 1.2 and 1.3, prefill 1.25 twice."""
    sizes = {"num_requests": 4, "prompt_length": 100, "output_length": 1}
    setting = {
        "record": "setting",
        "command": "sleb-serve bench m",
        "model": "m",
        "num_blocks": 10,
        "weights_sha256": "1" * 64,
        "options": {"starts": 1, "rounds": 2, "one_at_a_time": False},
        "workloads": [
            {"name": "prefill", "measure": "prefill", **sizes, "unit": "prompt tokens/s"},
            {
                "name": "decode",
                "measure": "decode",
                **sizes,
                "prompt_length": 16,
                "output_length": 11,
                "unit": "generated tokens/s",
            },
        ],
        "quality_text": "some text",
        "head_share": 0.5,
        "evaluation": {},
        "machine": {
            "cpu": "a cpu",
            "cores": 2,
            "gpus": [],
            "python": "3",
            "versions": {"vllm": "1", "torch": "2"},
        },
    }
    engines = [
        {
            "record": "engine",
            "start": 1,
            "variant": name,
            "kv_cache_tokens": tokens,
            "startup_time": 2.0,
            "memory_bytes": 3e9,
            "max_concurrency": 4.0,
        }
        for name, tokens in (("dense", 1000), ("sleb2", 1250))
    ]
    quality = [
        {"record": "quality", "variant": "dense", "loss": 2.0},
        {"record": "quality", "variant": "sleb2", "loss": 3.0},
    ]
    times = {
        ("prefill", "dense"): (9.0, 2.0, 1.0),
        ("prefill", "sleb2"): (1.0, 1.6, 0.8),
        ("decode", "dense"): (9.0, 1.2, 2.6),
        ("decode", "sleb2"): pruned_decode,
    }
    samples = [
        {
            "record": "sample",
            "workload": workload,
            "variant": name,
            "start": 1,
            "round": number,
            "elapsed_time": elapsed,
            "num_requests": 4,
            "total_input_tokens": 400 if workload == "prefill" else 64,
            "total_output_tokens": 4 if workload == "prefill" else 44,
        }
        for (workload, name), values in times.items()
        for number, elapsed in enumerate(values)
    ]
    return [setting, variant("dense", 0, None), variant("sleb2", 2), *engines, *quality, *samples]


def test_the_report_is_what_a_pocket_calculator_says() -> None:
    report = make_report(records())
    prefill, decode = report["workloads"]["prefill"], report["workloads"]["decode"]
    (of_prefill,), (of_decode,) = prefill["ratios"], decode["ratios"]
    assert prefill["throughput"]["dense"] == pytest.approx((400 / 2 + 400 / 1) / 2)
    assert prefill["latency"]["dense"] == pytest.approx((2 + 1) / 2)
    assert of_prefill["ratio_starts"] == [pytest.approx([1.25, 1.25])]
    assert of_prefill["ratio"] == pytest.approx(1.25)
    assert of_prefill["ideal"] == pytest.approx(10 / 8)
    assert of_prefill["efficiency"] == pytest.approx(1.0)
    assert of_prefill["efficiency_interval"] == pytest.approx([1.0, 1.0])
    # 4 sequences of 11 tokens: the first of each came with the prefill.
    assert decode["throughput"]["sleb2"] == pytest.approx((40 / 1.0 + 40 / 2.0) / 2)
    assert of_decode["ratio_starts"] == [pytest.approx([1.2, 1.3])]
    assert of_decode["ratio"] == pytest.approx(math.sqrt(1.2 * 1.3))
    assert of_decode["ideal"] == pytest.approx(1 / 0.9)
    perplexity = {name: v["perplexity"] for name, v in report["variants"].items()}
    assert perplexity == pytest.approx({"dense": math.e**2, "sleb2": math.e**3})


def test_time_outside_the_blocks_is_found_where_there_is_some() -> None:
    # 100 tokens of decode: 1 s + 0.4 s for each of 10 and 8 blocks.
    found = [r for r in records() if r["record"] != "sample"]
    for name, seconds in (("dense", 5.0), ("sleb2", 4.2)):
        found.append(
            {
                "record": "sample",
                "workload": "decode",
                "variant": name,
                "start": 1,
                "round": 1,
                "elapsed_time": seconds,
                "num_requests": 4,
                "total_input_tokens": 64,
                "total_output_tokens": 44,
            }
        )
    outside = make_report(found)["workloads"]["decode"]["outside_blocks"]
    assert outside["measured"] == pytest.approx(1 / 5)
    assert outside["by_weights"] == 0.5


def test_the_warm_up_is_left_out() -> None:
    kept = [r for r in records() if r.get("round") != 0]
    assert make_report(kept) == make_report(records())


def test_the_markdown_has_every_number_of_the_table() -> None:
    text = to_markdown(make_report(records()))
    for part in ("300.0", "375.0", "1.250", "1.111", "100 %", "1000", "7.39", "20.09", "a cpu"):
        assert part in text


def test_a_run_that_broke_off_says_so_first(tmp_path: Path) -> None:
    broken = [*records(), {"record": "failure", "what": "the server burnt"}]
    text = to_markdown(make_report(broken))
    assert text.index("the server burnt") < text.index("## Throughput")
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, broken)))
    write_report(tmp_path)
    assert "the server burnt" in (tmp_path / "report.html").read_text()


def test_the_ideal_ratio_is_the_papers_for_a_model_without_a_head() -> None:
    assert ideal_ratio(80, 16, 0.0) == pytest.approx(1.25)
    assert ideal_ratio(30, 6, 1.0) == 1.0
    assert efficiency(1.2, 1.25) == pytest.approx(0.8)
    assert efficiency(1.2, 1.0) is None


def test_the_interval_is_students_t_over_the_starts() -> None:
    stats = pytest.importorskip("scipy.stats")
    starts = [[1.1, 1.2], [1.3, 1.2], [1.1, 1.15]]
    logs = [sum(map(math.log, rounds)) / 2 for rounds in starts]
    mean = sum(logs) / 3
    expected = stats.t.interval(0.95, 2, loc=mean, scale=stats.sem(logs))
    found = paired_ratio(starts)
    assert found.mean == pytest.approx(math.exp(mean))
    assert found.interval == pytest.approx(tuple(map(math.exp, expected)), rel=1e-3)
    assert found.interval is not None
    assert found.interval[0] < 1.2 < found.interval[1] < 2.0


def test_the_quantiles_are_students() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in (*range(1, 60), 200):
        assert t95(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=3e-3)


def test_with_one_start_the_rounds_stand_in_and_one_sample_has_no_interval() -> None:
    found = paired_ratio([[1.1, 1.2, 1.3]])
    assert found.interval is not None
    assert found.interval[0] < 1.1 < 1.3 < found.interval[1]
    assert paired_ratio([[1.2]]).interval is None
    assert paired_ratio([[1.2] * 2] * 3).interval == pytest.approx((1.2, 1.2))


def test_a_line_is_found_again() -> None:
    assert line_fit([(x, 3 + 2 * x) for x in (1, 4, 9)]) == pytest.approx((3, 2))
    assert line_fit([(1.0, 2.0), (1.0, 3.0)]) is None


@pytest.mark.parametrize(
    ("decode", "verdict"),
    [
        ((1.0, 0.8, 2.0), "no difference shown"),
        ((1.0, 2.0, 4.35), "regression"),
        ((1.0, 0.5, 1.1), "improvement"),
    ],
)
def test_two_runs_are_told_apart_by_their_intervals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], decode: tuple[float, ...], verdict: str
) -> None:
    for name, run in (("a", records((1.0, 1.0, 2.1))), ("b", records(decode))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "records.jsonl").write_text("\n".join(map(json.dumps, run)))
    code = main(["report", str(tmp_path / "a"), str(tmp_path / "b")])
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("| decode"))
    assert verdict in line
    assert code == (verdict == "regression")


def test_runs_of_other_machines_and_sizes_are_said_to_be_so() -> None:
    before, after = make_report(records()), make_report(records())
    text, worse = comparison(before, after, ("a", "b"))
    assert not worse
    assert "Not the same" not in text
    assert [change.change for change in compare(before, after)] == [1.0, 1.0]
    after["machine"]["cpu"] = "another"
    after["workloads"]["decode"]["size"] = "other"
    text, _ = comparison(before, after, ("a", "b"))
    assert "Not the same machine" in text
    assert "Not the same decode" in text


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"record": "setting"}', "\u00e9"])
def test_records_that_are_none_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    if content is not None:
        (tmp_path / "records.jsonl").write_bytes(content.encode("latin-1"))
    assert main(["report", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "report.md").exists()


@pytest.fixture(scope="module")
def run(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small run with everything that can stand beside the dense model."""
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("run")
    path, manifest = models("llama"), folder / "m.json"
    select = ["select", str(path), "-o", str(manifest), "--remove", "2"]
    text = ["--calibration", "python-docs", "--sequences", "2", "--sequence-length", "32"]
    assert main([*select, *text]) == 0
    small = [
        *("--starts", "1", "--rounds", "2", "--prompt-length", "64", "--batch", "2"),
        *("--output-length", "8", "--requests", "4", "--perplexity-windows", "3"),
    ]
    work = [
        "--workloads",
        "prefill,decode,saturated",
        "--beside",
        "dense,export,capped,transformers",
    ]
    engine = ["--profile", "--engine-args", '{"enforce_eager": true, "dtype": "float32"}']
    out = folder / "out"
    arguments = ["bench", str(path), "-m", str(manifest), "-o", str(out), *small, *work, *engine]
    with pytest.MonkeyPatch.context() as patch:
        # The same engines, sooner: six times the import of vLLM is most of their time.
        patch.setattr("sleb_bench.engine.SpawnContext", forks)
        assert main(arguments) == 0
    return out


def raw_records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "records.jsonl").open()]


NAMES = {"dense", "dense-again", "sleb2", "sleb2-capped", "sleb2-export", "sleb2-transformers"}


def test_a_real_run_measures_every_variant_in_every_round(run: Path) -> None:
    raw = raw_records(run)
    samples = [record for record in raw if record["record"] == "sample"]
    seen = {(s["workload"], s["variant"], s["round"]) for s in samples}
    assert len(seen) == len(samples)
    assert seen == {
        (workload, name, number)
        for workload in ("prefill", "decode", "saturated")
        for name in NAMES
        for number in range(3)
        if (workload, name) != ("decode", "sleb2-transformers")
    }
    expected = {"prefill": (4, 256, 4), "decode": (2, 32, 16), "saturated": (4, 256, 32)}
    for sample in samples:
        found = ("num_requests", "total_input_tokens", "total_output_tokens")
        assert tuple(sample[key] for key in found) == expected[sample["workload"]]
        assert sample["elapsed_time"] > 0


def test_a_real_run_holds_the_cache_and_the_quality_of_each(run: Path, models: Models) -> None:
    from sleb_serve.checkpoint.hub import open_checkpoint
    from sleb_serve.data.calibration import held_out_windows
    from sleb_serve.data.tokenizer import load_tokenizer
    from sleb_serve.manifest.reader import read_manifest

    raw, path = raw_records(run), models("llama")
    tokens = {r["variant"]: r.get("kv_cache_tokens") for r in raw if r["record"] == "engine"}
    assert tokens["sleb2"] / tokens["dense"] == pytest.approx(8 / 6, rel=0.01)
    assert tokens["sleb2-export"] == tokens["sleb2"]
    assert tokens["sleb2-capped"] == tokens["dense-again"] == tokens["dense"]
    # Who started, and with what in memory: a tiny model, but all of Python and torch.
    assert all(r["memory_bytes"] > 1e8 for r in raw if r["record"] == "engine")
    read = {r["variant"]: r["weights_bytes"] for r in raw if r["record"] == "variant"}
    block = open_checkpoint(str(path)).parameter_counts()
    assert block is not None
    assert read["dense"] - read["sleb2"] == 4 * 2 * block[1][0]

    windows = held_out_windows(load_tokenizer(open_checkpoint(str(path))), 3, 64, None)
    losses = {r["variant"]: r["loss"] for r in raw if r["record"] == "quality"}
    dense = oracle.loss(oracle.load(path), windows)
    removed = read_manifest(run.parent / "m.json").blocks
    pruned = oracle.loss(oracle.pruned(path, removed), windows)
    for name in NAMES:
        expected = dense if name.startswith("dense") else pruned
        assert losses[name] == pytest.approx(expected, rel=1e-4), name


def operators(table: str) -> dict[str, int]:
    """How often each operator was called, of a profile."""
    rows = (re.split(r"\s{2,}", line.strip()) for line in table.splitlines())
    return {row[0]: int(row[-1]) for row in rows if len(row) > 2 and row[-1].isdecimal()}


@pytest.mark.parametrize("workload", ["prefill", "decode"])
def test_the_plugin_calls_no_operator_that_the_exported_checkpoint_does_not(
    run: Path, workload: str
) -> None:
    """What stock vLLM does for a model that never had the blocks, and no more: speed aside."""
    dense, pruned, exported = (
        operators((run / f"profile-{name}-{workload}.txt").read_text())
        for name in ("dense", "sleb2", "sleb2-export")
    )
    assert len(pruned) > 20
    assert pruned == exported
    assert sum(pruned.values()) < sum(dense.values())


def test_a_real_run_is_reported_from_its_records_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(run / "records.jsonl", tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.rstrip() == (run / "report.md").read_text().rstrip()
    assert (tmp_path / "report.json").read_text() == (run / "report.json").read_text()
    for name in ("throughput.png", "frontier.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    ratios = json.loads((run / "report.json").read_text())["workloads"]["saturated"]["ratios"]
    assert [(ratio["variant"], ratio["over"]) for ratio in ratios] == [
        ("dense-again", "dense"),
        ("sleb2", "dense"),
        ("sleb2-capped", "dense"),
        ("sleb2", "sleb2-capped"),
        ("sleb2-export", "sleb2"),
        ("sleb2-transformers", "sleb2"),
    ]


def test_the_page_needs_nothing_else(run: Path) -> None:
    page = (run / "report.html").read_text()
    sources = re.findall(r"""(?:src|href)=["']?([^"'\s>]+)""", page)
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert "http:" not in page
    assert "url(" not in page
    chromium = shutil.which("chromium")
    if chromium is None:
        return
    quiet = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    done = subprocess.run(
        [
            *(chromium, *quiet.split(), "--disable-component-update", "--disable-sync"),
            *("--enable-logging=stderr", "--dump-dom", (run / "report.html").as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.count("<img") == 2
    assert "CONSOLE" not in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--starts", "0"], "--starts must be at least 1"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--output-length", "1"], "--output-length must be at least 2"),
        (["--engine-args", "{"], "not JSON"),
        (["--engine-args", "[]"], "must be an object"),
        (["--workloads", "none"], "--workloads: none is not one of prefill, decode"),
        (["--beside", "none"], "--beside: none is not one of dense, export"),
        (["--blocks", "0,1"], "the dense model is always measured"),
        (["--blocks", "2"], "1"),
        (["--request-rates", "0"], "--request-rates are above 0"),
        (["--request-rates", "fast"], "--request-rates fast: give numbers or inf"),
        (["--slo", "speed:3"], "--slo speed:3: give milliseconds for ttft, tpot, e2el"),
        (["--slo", "ttft"], "--slo ttft: give milliseconds"),
        (["--serving-output-length", "1"], "--serving-output-length must be at least 2"),
    ],
)
def test_bad_options_are_refused(
    models: Models,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    from sleb_serve.checkpoint.hub import open_checkpoint
    from sleb_serve.manifest.binding import bind
    from sleb_serve.manifest.schema import Manifest, Removal

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
    from sleb_serve.checkpoint.hub import open_checkpoint
    from sleb_serve.manifest.binding import bind
    from sleb_serve.manifest.schema import Manifest, Removal

    path = str(models("llama"))
    Manifest(bind(path, open_checkpoint(path)), (Removal(3),)).write(tmp_path / "m.json")
    out = tmp_path / "out"
    arguments = ["bench", path, "-m", str(tmp_path / "m.json"), "-o", str(out)]
    assert main([*arguments, "--engine-args", '{"max_model_len": 4096}']) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("sleb-serve: error: the dense engine failed: ")
    assert "max_model_len" in error
    assert not (out / "report.json").exists()
