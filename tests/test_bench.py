"""The paired benchmark: one real run, and refusals."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import oracle
from conftest import Models
from forking import forks
from sleb_serve.cli.main import main


@pytest.fixture(scope="module")
def run(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small run with all optional variants."""
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("run")
    path, manifest = models("llama"), folder / "m.json"
    select = ["select", str(path), "-o", str(manifest), "--remove", "2"]
    text = ["--calibration", "python-docs", "--sequences", "2", "--sequence-length", "32"]
    assert main([*select, *text]) == 0
    small = [
        *("--starts", "1", "--minutes", "0.001", "--prompt-length", "64", "--batch", "2"),
        *("--output-length", "8", "--requests", "4", "--perplexity-sequences", "3"),
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
        patch.setattr("sleb_bench.engine.process_context", forks)
        # One call a turn.
        patch.setattr("sleb_bench.pace.TURN", 0.0)
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
    rounds = {name: {r for w, _, r in seen if w == name} for name in ("prefill", "decode")}
    for warm_up_and_pairs in rounds.values():
        # Two turns at least that warm up; the time is over after two pairs.
        assert warm_up_and_pairs >= {-1, 0, 1, 2}
        assert max(warm_up_and_pairs) == 2
    assert {(w, name) for w, name, _ in seen} == {
        (workload, name)
        for workload in ("prefill", "decode", "saturated")
        for name in NAMES
        if (workload, name) != ("decode", "sleb2-transformers")
    }
    # Turn by turn: in the second round who goes first is not who did in the first.
    order = [s["variant"] for s in samples if (s["workload"], s["round"]) == ("prefill", 1)]
    back = [s["variant"] for s in samples if (s["workload"], s["round"]) == ("prefill", 2)]
    assert back == order[::-1]
    (end,) = (record for record in raw if record["record"] == "end")
    assert (end["why"], end["starts"]) == ("time over", 1)


def test_a_real_run_says_what_it_used_and_what_shared_a_process(run: Path) -> None:
    raw = raw_records(run)
    processes = {r["variant"]: r["process"] for r in raw if r["record"] == "engine"}
    apart = {name: name for name in ("sleb2-export", "sleb2-transformers")}
    assert processes == {**dict.fromkeys(NAMES, "shared"), **apart}
    for sample in (record for record in raw if record["record"] == "sample"):
        # An engine of two cores at most; prompts of decode count, too.
        assert sample["cpu_time"] > 0
        assert sample["conditions"].keys() == {"others", "steal", "load", "mhz", "disturbed"}
    ratios = json.loads((run / "report.json").read_text())["workloads"]["saturated"]["ratios"]
    kinds = {ratio["variant"]: ratio["samples"] for ratio in ratios if ratio["over"] == "dense"}
    assert kinds == dict.fromkeys(("dense-again", "sleb2", "sleb2-capped"), "blocks")
    assert all(ratio["cpu_ratio"] > 0 for ratio in ratios)


def test_a_real_runs_samples_are_what_was_asked_for(run: Path) -> None:
    samples = [record for record in raw_records(run) if record["record"] == "sample"]
    expected = {"prefill": (1, 64, 1), "decode": (2, 8, 16), "saturated": (4, 256, 32)}
    for sample in samples:
        found = ("num_requests", "total_input_tokens", "total_output_tokens")
        assert tuple(sample[key] for key in found) == expected[sample["workload"]]
        assert sample["elapsed_time"] > 0


def test_a_real_run_holds_the_cache_and_the_quality_of_each(run: Path, models: Models) -> None:
    from sleb_serve.checkpoint.hub import open_checkpoint
    from sleb_serve.data.calibration import held_out_sequences
    from sleb_serve.data.tokenizer import load_tokenizer
    from sleb_serve.manifest.reader import read_manifest

    raw, path = raw_records(run), models("llama")
    tokens: dict[str, Any] = {
        r["variant"]: r.get("kv_cache_tokens") for r in raw if r["record"] == "engine"
    }
    assert tokens["sleb2"] / tokens["dense"] == pytest.approx(8 / 6, rel=0.01)
    assert tokens["sleb2-export"] == tokens["sleb2"]
    assert tokens["sleb2-capped"] == tokens["dense-again"] == tokens["dense"]
    # With what in memory: a tiny model, but all of Python and torch. Told of who came first.
    memory = {r["variant"]: r["memory_bytes"] for r in raw if r["record"] == "engine"}
    assert all(memory[name] > 1e8 for name in ("dense", "sleb2-export", "sleb2-transformers"))
    assert memory["sleb2"] is None
    read = {r["variant"]: r["weights_bytes"] for r in raw if r["record"] == "variant"}
    block = open_checkpoint(str(path)).parameter_counts()
    assert block is not None
    assert read["dense"] - read["sleb2"] == 4 * 2 * block[1][0]

    sequences = held_out_sequences(load_tokenizer(open_checkpoint(str(path))), 3, 64, None)
    losses = {r["variant"]: r["loss"] for r in raw if r["record"] == "quality"}
    dense = oracle.loss(oracle.load(path), sequences)
    removed = read_manifest(run.parent / "m.json").blocks
    pruned = oracle.loss(oracle.pruned(path, removed), sequences)
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


def test_a_browser_shows_the_page_without_complaint(run: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
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
        (["--minutes", "0"], "--minutes must be a number above 0"),
        (["--precision", "nan"], "--precision must be a number above 0"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--output-length", "1"], "--output-length must be at least 2"),
        (["--engine-args", "{"], "not JSON"),
        (["--engine-args", "[]"], "must be an object"),
        (["--workloads", "none"], "--workloads: none is not one of prefill, decode"),
        (["--beside", "none"], "--beside: none is not one of dense, export"),
        (["--blocks", "0,1"], "the dense model is always measured"),
        (["--blocks", "2"], "1"),
        (["--request-rates", "0"], "--request-rates must be above 0"),
        (["--request-rates", "fast"], "--request-rates fast: give numbers or inf"),
        (["--slo", "speed=3ms"], "--slo speed=3ms: give times for ttft, tpot, e2el"),
        (["--slo", "ttft"], "--slo ttft: give times in ms or s"),
        (["--slo", "ttft=1h"], "--slo ttft=1h: give times in ms or s"),
        (["--gpu-hour", "0"], "--gpu-hour must be a number above 0"),
        (["--dataset", "texts.txt"], "--dataset texts.txt: give a ShareGPT file (.json)"),
        (["--dataset", "gone.json"], "--dataset gone.json: no such file"),
        (["--dense", "http://localhost:1"], "--dense and --pruned: give both"),
        (
            ["--dense", "http://localhost:1", "--pruned", "http://localhost:2"],
            "--dense and --pruned need --workloads",
        ),
        (
            [
                *("--dense", "http://localhost:1", "--pruned", "http://localhost:2"),
                *("--workloads", "serving"),
            ],
            "http://localhost:2/sleb/manifest: no answer",
        ),
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
