"""The paired benchmark's arithmetic and report."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from itertools import combinations_with_replacement
from pathlib import Path
from statistics import fmean, geometric_mean, median

import intervals
import pytest

from bench_records import QUIET, records
from sleb_bench.compare import compare, comparison
from sleb_bench.files import write_report
from sleb_bench.markdown import to_markdown
from sleb_bench.ratios import (
    Ratio,
    against_ideal,
    efficiency,
    outside_blocks,
    paired_ratio,
    t95,
)
from sleb_bench.report import make_report
from sleb_bench.tables import efficiency_cell
from sleb_serve.cli.main import main
from sleb_serve.roofline.ideal import ideal_ratio


def test_the_report_is_what_a_pocket_calculator_says() -> None:
    report = make_report(records())
    prefill, decode = report["workloads"]["prefill"], report["workloads"]["decode"]
    (of_prefill,), (of_decode,) = prefill["ratios"], decode["ratios"]
    assert prefill["throughput"]["dense"] == pytest.approx((400 / 2 + 400 / 1.3) / 2)
    assert prefill["latency"]["dense"] == pytest.approx((2 + 1.3) / 2)
    assert [pair["speed"] for pair in of_prefill["pairs"]] == pytest.approx([1.25, 1.3])
    assert of_prefill["ratio"] == pytest.approx(math.sqrt(1.25 * 1.3))
    assert of_prefill["ideal"] == pytest.approx(10 / 8)
    # 4 sequences of 11 tokens: the first of each came with the prefill.
    assert decode["throughput"]["sleb2"] == pytest.approx((40 / 1.0 + 40 / 2.0) / 2)
    assert decode["cpu_per_token"]["sleb2"] == pytest.approx(2 * (1.0 / 40 + 2.0 / 40) / 2)
    assert [pair["speed"] for pair in of_decode["pairs"]] == pytest.approx([1.2, 1.3])
    assert of_decode["ratio"] == of_decode["cpu_ratio"] == pytest.approx(math.sqrt(1.2 * 1.3))
    assert of_decode["ideal"] == pytest.approx(1 / 0.9)
    perplexity = {name: v["perplexity"] for name, v in report["variants"].items()}
    assert perplexity == pytest.approx({"dense": math.e**2, "sleb2": math.e**3})


def test_time_outside_the_blocks_is_found_where_there_is_some() -> None:
    # 1 s + 0.4 s for each of 10 and 8 blocks: 5 s and 4.2 s, a fifth of the dense time outside.
    assert outside_blocks(Ratio(5 / 4.2, (5 / 4.2,) * 2), 10, 2) == pytest.approx((0.2, 0.2))
    # No share is below none or above all of the time.
    assert outside_blocks(Ratio(1.3, (1.1, 1.5)), 10, 2) == pytest.approx((0, 1 - 10 / 2 / 11))
    assert outside_blocks(Ratio(1.1, (0.9, 1.2)), 10, 2) == pytest.approx((1 - 10 / 2 / 6, 1))
    assert outside_blocks(Ratio(1.5, (1.4, 1.6)), 10, 2) is None
    assert outside_blocks(Ratio(1.5, None), 10, 2) is None


def test_the_warm_up_is_left_out() -> None:
    kept = [r for r in records() if r.get("round") != 0]
    assert make_report(kept) == make_report(records())
    earlier = [{**r, "round": -1} for r in records() if r.get("round") == 0]
    assert make_report([*records(), *earlier]) == make_report(records())


def test_the_markdown_has_every_number_of_the_table() -> None:
    text = to_markdown(make_report(records()))
    for part in ("253.8", "325.0", "1.275", "1.250", "1.111", "1000", "7.39", "20.09", "a cpu"):
        assert part in text


@pytest.mark.parametrize(
    ("interval", "verdict", "text"),
    [
        ((1.16, 1.22), "not told apart from ideal", "at least 80 %, not told apart from ideal"),
        ((1.12, 1.18), "below ideal", "75 % (60 to 90)"),
        ((1.21, 1.23), "above ideal", "above ideal"),
        ((0.98, 1.30), "no gain shown", "no gain shown"),
        (None, None, ""),
    ],
)
def test_no_more_is_said_of_the_ideal_than_the_interval_tells(
    interval: tuple[float, float] | None, verdict: str | None, text: str
) -> None:
    mean = math.sqrt(math.prod(interval)) if interval else 1.5
    found = against_ideal(Ratio(mean, interval), 1.2)
    assert found["verdict"] == verdict
    assert efficiency_cell(found) == text
    told = verdict == "below ideal"
    assert (found["efficiency"] is not None) == told == (found["efficiency_interval"] is not None)


def test_the_report_says_which_pairs_were_disturbed_and_why_the_run_ended() -> None:
    many = records((9.0, *(1.0 + number / 100 for number in range(20))), 1.2)
    for sample in many:
        if (sample.get("workload"), sample.get("round")) == ("decode", 3):
            sample["conditions"] = {**QUIET, "disturbed": True}
    (ratio,) = make_report(many)["workloads"]["decode"]["ratios"]
    assert [pair["disturbed"] for pair in ratio["pairs"]] == [n == 3 for n in range(1, 21)]
    without = [r for r in many if (r.get("workload"), r.get("round")) != ("decode", 3)]
    (quiet,) = make_report(without)["workloads"]["decode"]["ratios"]
    assert ratio["quiet_ratio"] == quiet["ratio"] != ratio["ratio"]
    text = to_markdown(make_report(many))
    assert "20 pairs in one start; 1 disturbed" in text
    assert f"without those {quiet['ratio']:.3f}" in text
    assert "Ended after 1.5 of 1 minutes, 1 start: time over. Wider than 2 % to a side:" in text


def test_the_report_repeats_the_manifests_verdict_on_quality() -> None:
    many = records()
    assert "evaluated" not in to_markdown(make_report(many))  # records of older versions
    (pruned,) = (record for record in many if record.get("blocks") == 2)
    for verdict, text in (("harmful", "harmful"), (None, "not evaluated")):
        pruned["verdict"] = verdict
        rows = [row for row in to_markdown(make_report(many)).splitlines() if "| sleb2" in row]
        assert rows[-1].split("|")[-2].strip() == text


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


def test_engines_apart_have_students_interval_over_their_starts() -> None:
    stats = pytest.importorskip("scipy.stats")
    starts = [[1.1, 1.2], [1.3, 1.2], [1.1, 1.15]]
    logs = [sum(map(math.log, rounds)) / 2 for rounds in starts]
    mean = sum(logs) / 3
    expected = stats.t.interval(0.95, 2, loc=mean, scale=stats.sem(logs))
    found = paired_ratio(starts, apart=True)
    assert (found.samples, found.count) == ("starts", 3)
    assert found.mean == pytest.approx(math.exp(mean))
    assert found.interval == pytest.approx(tuple(map(math.exp, expected)), rel=1e-3)


def test_the_quantiles_are_students() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in (*range(1, 60), 200):
        assert t95(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=3e-3)


def middle(logs: Sequence[float]) -> float:
    """Hodges and Lehmann's estimate, plainly."""
    return median((a + b) / 2 for a, b in combinations_with_replacement(logs, 2))


def test_the_interval_of_pairs_leaves_out_block_by_block() -> None:
    stats = pytest.importorskip("scipy.stats")
    source = random.Random(1)
    starts = [[math.exp(source.gauss(0.2, 0.05)) for _ in range(n)] for n in (18, 22)]
    logs = [[math.log(ratio) for ratio in pairs] for pairs in starts]
    # Four neighbours a block; what is left over belongs to the start's last.
    edges = [(0, (0, 4)), (0, (4, 8)), (0, (8, 12)), (0, (12, 18))]
    edges += [(1, (4 * n, 4 * n + 4)) for n in range(4)] + [(1, (16, 22))]
    without = [
        middle(
            [
                v
                for s, of in enumerate(logs)
                for i, v in enumerate(of)
                if not (s == b and a <= i < z)
            ]
        )
        for b, (a, z) in edges
    ]
    whole, count = middle([*logs[0], *logs[1]]), len(edges)
    error = math.sqrt((count - 1) / count * sum((v - fmean(without)) ** 2 for v in without))
    half = stats.t.ppf(0.975, count - 1) * error
    found = paired_ratio(starts)
    assert (found.samples, found.count) == ("blocks", count)
    assert found.mean == pytest.approx(math.exp(whole))
    assert found.interval == pytest.approx(
        (math.exp(whole - half), math.exp(whole + half)), rel=1e-3
    )


def test_a_few_disturbed_pairs_move_the_ratio_little() -> None:
    source = random.Random(2)
    pairs = [1.2 * math.exp(source.gauss(0, 0.01)) for _ in range(24)]
    bad = [*pairs[:8], 5.0, 4.0, 0.2, *pairs[11:20], 3.0, *pairs[21:]]
    assert paired_ratio([bad]).mean == pytest.approx(paired_ratio([pairs]).mean, rel=0.01)
    assert geometric_mean(bad) > 1.05 * geometric_mean(pairs)


def test_starts_that_differ_by_more_than_their_pairs_are_the_samples() -> None:
    source = random.Random(3)
    starts = [[s * math.exp(source.gauss(0, 0.01)) for _ in range(12)] for s in (1.1, 1.2, 1.3)]
    found = paired_ratio(starts)
    assert (found.samples, found.count) == ("starts", 3)
    assert found.interval is not None
    assert found.interval[0] < 1.0 < 1.4 < found.interval[1]


def test_one_sample_has_no_interval_and_one_start_of_engines_apart_is_never_precise() -> None:
    assert paired_ratio([[1.2]]).interval is None
    assert paired_ratio([[1.2] * 2] * 3).interval == pytest.approx((1.2, 1.2))
    assert paired_ratio([[1.2] * 8]).within(0.02)
    assert not paired_ratio([[1.2] * 8], apart=True).within(0.02)


def test_the_interval_holds_the_truth_on_a_busy_machine() -> None:
    """Simulated runs, ended by the benchmark's own rules; `intervals.py` prints the whole table."""
    for name, precise in (("quiet", 95), ("bursts of 5 s, up to 3 times slower", 40)):
        runs = intervals.coverage(intervals.MACHINES[name], 100, seed=1)
        # Of 100 with 95 % each, fewer than 88 would be seen once in 200 times.
        assert sum(map(intervals.holds, runs)) >= 88, name
        # The others ended by their time.
        assert sum(run.precise for run in runs) >= precise, name


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


def test_the_highest_rates_within_a_level_are_told_with_what_they_lie_between() -> None:
    loads = {"dense": {1.0: 1.0, 2.0: 0.95, 2.2: 0.8}, "sleb2": {2.0: 1.0, 2.5: 0.9, 3.0: 0.1}}
    searched = [
        {
            "record": "slo",
            "variant": name,
            "request_rate": rate,
            "met": share,
            "capacity": 4.0,
            "result": {"prefix_cache_hit_rate": 0.25},
        }
        for name, rates in loads.items()
        for rate, share in rates.items()
    ]
    found = [*records(), *searched]
    found[0]["options"]["serving"] = {"slo": {"ttft": 450.0}, "requests": 8}
    report = make_report(found)
    (gain,) = report["slo"]["ratios"]
    assert gain["ratio"] == 2.5 / 2.0
    assert gain["between"] == [2.5 / 2.2, 3.0 / 2.0]
    text = to_markdown(report)
    assert "| sleb2   | 2.5        | 3      | dense | 1.250 (1.136 to 1.500) |" in text
    assert "90 % of 8 requests met ttft 450 ms" in text
    # Without the rate that failed, the search was cut short or had reached the capacity.
    text = to_markdown(make_report(found[:-1]))
    assert "| sleb2   | 2.5        |        | dense | 1.250 (at least 1.136) |" in text
    # Neither failed at any rate: both are at their capacity.
    text = to_markdown(make_report([*found[:-4], *found[-3:-1]]))
    assert "dense | 1.250 " in text
    assert "1.250 (" not in text
    found[-2]["capacity"] = 2.5
    text = to_markdown(make_report(found[:-1]))
    assert "| sleb2   | 2.5        | its capacity | dense | 1.250 (at least 1.136) |" in text
    # Neither failed at any rate: both are at their capacity.
    text = to_markdown(make_report([*found[:-4], *found[-3:-1]]))
    assert "dense | 1.250 " in text
    assert "1.250 (" not in text


def test_a_million_tokens_cost_what_the_hour_costs() -> None:
    found = records()
    found[0]["options"]["gpu_hour"] = 3.6
    prefill = make_report(found)["workloads"]["prefill"]
    # 253.8 tokens/s for 3.6 an hour, which is a thousandth a second.
    assert prefill["cost_per_million"]["dense"] == pytest.approx(1e6 * 0.001 / 253.846, rel=1e-4)
    assert "prefill, cost of a million tokens: dense 3.94" in to_markdown(make_report(found))


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"record": "setting"}', "\u00e9"])
def test_records_that_are_none_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    if content is not None:
        (tmp_path / "records.jsonl").write_bytes(content.encode("latin-1"))
    assert main(["report", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "report.md").exists()
