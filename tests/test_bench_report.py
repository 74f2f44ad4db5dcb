"""The paired benchmark's arithmetic, and what its report says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bench_records import records
from sleb_bench.compare import compare, comparison
from sleb_bench.files import write_report
from sleb_bench.markdown import to_markdown
from sleb_bench.ratios import efficiency, line_fit, paired_ratio, t95
from sleb_bench.report import make_report
from sleb_serve.cli.main import main
from sleb_serve.roofline.ideal import ideal_ratio


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
