"""Load over HTTP on real servers, one of which dies under it."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from conftest import Models

pytest.importorskip("vllm")
psutil = pytest.importorskip("psutil")

from running import LOCAL, OPTIONS, ForkedServer, printed_command  # noqa: E402
from sleb_bench import run as bench_run  # noqa: E402
from sleb_bench import serving_load  # noqa: E402
from sleb_bench.run import BenchOptions, bench  # noqa: E402
from sleb_bench.server import Server, free_port  # noqa: E402
from sleb_bench.serving import serve_and_load  # noqa: E402
from sleb_bench.serving_load import cli_options  # noqa: E402
from sleb_bench.serving_options import ServingOptions  # noqa: E402
from sleb_bench.slo import bracket, met, next_rate  # noqa: E402
from sleb_serve.checkpoint.hub import open_checkpoint  # noqa: E402
from sleb_serve.cli.main import main  # noqa: E402
from sleb_serve.errors import SlebError  # noqa: E402
from sleb_serve.manifest.binding import bind  # noqa: E402
from sleb_serve.manifest.schema import Manifest, Removal  # noqa: E402
from sleb_serve.serving.command import server_command  # noqa: E402

FAST, SLOW = 20.0, 2.0
SERVING = ServingOptions(
    rates=(FAST, SLOW),
    requests=8,
    input_length=16,
    output_length=4,
    slo={"ttft": 60000.0, "tpot": 60000.0},
    rounds=1,
)


def kill_under_load(running: Server) -> None:
    """Kill a server once its next load has begun."""
    server, url = psutil.Process(running.process.pid), f"{running.url}/metrics"

    def answered() -> float:
        text = urllib.request.urlopen(url, timeout=10).read().decode()
        lines = [line for line in text.splitlines() if line.startswith("vllm:request_success")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def watch() -> None:
        before = answered()
        while answered() == before:
            time.sleep(0.05)
        for process in (*server.children(recursive=True), server):
            process.kill()

    threading.Thread(target=watch, daemon=True).start()


@pytest.fixture(scope="module")
def broken_run(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose pruned server is killed in the middle of its last load."""
    path, out = models("llama"), tmp_path_factory.mktemp("serving") / "out"
    manifest = Manifest(bind(str(path), open_checkpoint(str(path))), (Removal(3), Removal(1)))
    servers: list[ForkedServer] = []

    def start(*arguments: Any) -> ForkedServer:
        servers.append(ForkedServer(*arguments))
        return servers[-1]

    def watched(*arguments: Any, **more: Any) -> Iterator[dict[str, Any]]:
        for record in serve_and_load(*arguments, **more):
            # In round 1 the dense model goes first, so the pruned one's load comes next.
            place = tuple(record.get(key) for key in ("variant", "round", "request_rate"))
            yield record
            if place == ("dense", 1, SLOW):
                kill_under_load(next(s for s in reversed(servers) if "sleb2" in s.command))

    options = BenchOptions(
        model=str(path),
        output=out,
        workloads=("serving",),
        engine_args='{"enforce_eager": true, "dtype": "float32"}',
        serving=SERVING,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_run, "serve_and_load", watched)
        patch.setattr(serving_load, "Server", start)
        with pytest.raises(SlebError, match="the sleb2 server"):
            bench(options, manifest, None, lambda text: None)
    return out


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in (folder / "records.jsonl").open())
    return [record for record in lines if record["record"] == kind]


@pytest.mark.slow
def test_the_same_load_is_offered_to_both_servers(broken_run: Path) -> None:
    served = records(broken_run, "serving")
    assert [(r["variant"], r["round"], r["request_rate"]) for r in served] == [
        ("sleb2", 0, "inf"),
        ("dense", 0, "inf"),
        ("dense", 1, FAST),
        ("sleb2", 1, FAST),
        ("dense", 1, SLOW),
    ]
    for record in served:
        result = record["result"]
        assert (result["completed"], result["failed"]) == (8, 0)
        assert result["total_output_tokens"] == 8 * 4
        assert len(result["ttfts"]) == len(result["itls"]) == 8
        assert result["prefix_cache_hit_rate"] == 0
        # The SLO is one that everything meets.
        assert result["request_goodput"] == pytest.approx(result["request_throughput"])
        assert 0 < result["p50_ttft_ms"] <= result["p99_ttft_ms"]
    assert served[2]["result"]["input_lens"] == served[3]["result"]["input_lens"]
    slow = served[4]["result"]
    assert slow["request_throughput"] < 2 * SLOW


@pytest.mark.slow
def test_a_server_that_dies_under_load_is_reported(broken_run: Path) -> None:
    (failure,) = records(broken_run, "failure")
    assert failure["variant"] == "sleb2"
    for part in (
        "the sleb2 server at 2 requests/s ended with exit code -9",
        "of 8 requests failed",
    ):
        assert part in failure["what"]
    markdown = (broken_run / "report.md").read_text()
    assert markdown.index("Broken off") < markdown.index("Serving: what it gains")
    assert "ended with exit code -9" in markdown
    assert "ended with exit code -9" in (broken_run / "report.html").read_text()
    report = json.loads((broken_run / "report.json").read_text())
    # What was measured before is kept: the pair at the fast rate.
    (ratio,) = report["serving"]["saturation"]["ratios"]
    assert (ratio["variant"], ratio["over"]) == ("sleb2", "dense")
    points = {p["request_rate"]: set(p["variants"]) for p in report["serving"]["points"]}
    assert points == {FAST: {"dense", "sleb2"}, SLOW: {"dense"}}
    assert (broken_run / "latency.png").read_bytes().startswith(b"\x89PNG")


def test_an_engines_arguments_become_a_servers_options() -> None:
    arguments = {
        "model": "m",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "hf_overrides": {"a": [1]},
        "tensor_parallel_size": 2,
        "max_num_seqs": 4,
        "quantization": None,
    }
    assert cli_options(arguments) == [
        "--enforce-eager",
        "--no-enable-prefix-caching",
        *("--hf-overrides", '{"a": [1]}'),
        *("--tensor-parallel-size", "2"),
    ]


@pytest.mark.parametrize("truth", [0.3, 7.0, 9.9])
def test_the_search_ends_close_to_the_highest_rate_that_meets_the_level(truth: float) -> None:
    tried: list[tuple[float, float]] = []
    while (rate := next_rate(tried, capacity=10.0)) is not None:
        tried.append((rate, 1.0 if rate <= truth else 0.5))
    low, high = bracket(tried)
    assert low is not None
    assert high is not None
    assert low <= truth < high <= 1.1 * low
    assert len(tried) <= 12


@pytest.mark.parametrize("truth", [10.0, 42.0, float("inf")])
def test_no_rate_above_the_capacity_counts(truth: float) -> None:
    """A dozen requests at 254 per second are a burst that was answered in time, not a rate."""
    tried: list[tuple[float, float]] = []
    while (rate := next_rate(tried, capacity=10.0)) is not None:
        tried.append((rate, 1.0 if rate <= truth else 0.5))
    assert bracket(tried) == (10.0, None)


def test_a_level_that_no_rate_meets_ends_the_search_too() -> None:
    tried: list[tuple[float, float]] = []
    while (rate := next_rate(tried, capacity=10.0)) is not None:
        tried.append((rate, 0.0))
    assert bracket(tried) == (None, min(rate for rate, _ in tried))
    # A lucky load above one that failed is none: the level is met below it.
    assert bracket([(1.0, 1.0), (2.0, 0.5), (3.0, 1.0)]) == (1.0, 2.0)
    assert met({"request_goodput": 2.0, "duration": 3.0}, 8) == 0.75


@pytest.mark.slow
def test_servers_that_run_are_searched_with_prompts_of_a_file(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The highest rate within a level that everything meets, of servers that we do not start."""
    path = models("llama")
    manifest = Manifest(bind(str(path), open_checkpoint(str(path))), (Removal(3), Removal(1)))
    manifest.write(tmp_path / "m.json")
    prompts = [{"prompt": f"{number} and {number}" * 3} for number in range(20)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    with ExitStack() as stack:
        urls = {}
        commands = {
            "dense": server_command(str(path), OPTIONS),
            "pruned": printed_command(path, tmp_path / "m.json", *OPTIONS),
        }
        for name, command in commands.items():
            port = free_port()
            log = tmp_path / f"{name}.log"
            server = ForkedServer([*command, *LOCAL, str(port)], port, log)
            stack.callback(server.stop)
            urls[name] = server
        for server in urls.values():
            server.wait(300)
        arguments = [
            "bench",
            str(path),
            "-m",
            str(tmp_path / "m.json"),
            "-o",
            str(tmp_path / "out"),
        ]
        small = ["--serving-requests", "6", "--serving-output-length", "4"]
        limits = ["--workloads", "slo", "--slo", "ttft=60s,tpot=60000ms"]
        data = ["--dataset", str(tmp_path / "texts.jsonl")]
        running = ["--dense", urls["dense"].url, "--pruned", urls["pruned"].url]
        assert main([*arguments, *small, *limits, *data, *running]) == 0
        # The wrong way round nothing would be measured, and nothing is.
        swapped = ["--dense", urls["pruned"].url, "--pruned", urls["dense"].url]
        assert main([*arguments, *small, *limits, *data, *swapped]) == 2
        assert "a dense model" in capsys.readouterr().err
    searched = records(tmp_path / "out", "slo")
    for name in ("dense", "sleb2"):
        rates = [r["request_rate"] for r in searched if r["variant"] == name]
        # All meet the level: the rate grows until it is the server's capacity.
        assert rates == sorted(rates)
        (alone,) = (r for r in records(tmp_path / "out", "serving") if r["variant"] == name)
        assert rates[-1] == alone["result"]["request_throughput"]
    assert all(r["met"] == pytest.approx(1) for r in searched)
    lengths = {length for r in searched for length in r["result"]["input_lens"]}
    assert len(lengths) > 0
    assert max(lengths) < 128
    found = json.loads((tmp_path / "out" / "report.json").read_text())["slo"]["variants"]
    assert found["dense"]["not_at"] is None
    assert (
        "## Highest rate within the service level" in (tmp_path / "out" / "report.md").read_text()
    )
