"""What a benchmark's plots show, and the costs beside them."""

from __future__ import annotations

from typing import Any

import pytest

from bench_records import records
from sleb_bench import pictures as drawn
from sleb_bench.markdown import to_markdown
from sleb_bench.pictures import pictures
from sleb_bench.report import make_report


def served(variant: str, concurrency: int, rate: float, tpot: float) -> dict[str, Any]:
    latencies = {f"p{p}_{name}_ms": tpot for p in (50, 90, 99) for name in ("ttft", "itl", "e2el")}
    tpots = {f"p{p}_tpot_ms": tpot for p in (50, 90, 99)}
    rates = dict.fromkeys(("request_throughput", "request_goodput"), 1.0)
    result = {"output_throughput": rate, "completed": 8, "failed": 0, "prefix_cache_hit_rate": 0.0}
    point = {"round": 1, "request_rate": "inf", "max_concurrency": concurrency}
    return {
        "record": "serving",
        "variant": variant,
        **point,
        "result": {**result, **rates, **latencies, **tpots},
    }


@pytest.mark.parametrize(("gpus", "unit", "divisor"), [([], "server", 1), ([{}, {}], "GPU", 2)])
def test_what_all_users_get_is_drawn_over_what_each_one_gets(
    gpus: list[dict[str, str]], unit: str, divisor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"name": "G", "driver_version": "1", "clocks.current.sm": "2"}
    loads = {("dense", 1): (100.0, 10.0), ("dense", 4): (300.0, 12.5), ("sleb2", 4): (360.0, 10.0)}
    found = [*records(), *(served(*place, *values) for place, values in loads.items())]
    options = {"slo": {"ttft": 450.0}, "requests": 8, "input_length": 4, "output_length": 5}
    found[0]["options"] |= {
        "gpu_hour": 3.6,
        "serving": {**options, "rounds": 1},
    }
    found[1]["engine_arguments"] = {"tensor_parallel_size": 2}
    found[0]["machine"]["gpus"] = [gpu | names for gpu in gpus]
    figures: list[Any] = []

    def kept(figure: Any) -> bytes:
        figures.append(figure)
        return b""

    monkeypatch.setattr(drawn, "png", kept)
    report = make_report(found)
    assert set(pictures(report)) == {"throughput", "latency", "pareto", "frontier"}
    (axis,) = next(f for f in figures if "each user" in f.axes[0].get_xlabel()).axes
    assert axis.get_ylabel() == f"generated tokens/s of a {unit}"
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}
    assert lines == {
        "dense": [[80.0, 300.0 / divisor], [100.0, 100.0 / divisor]],
        "sleb2": [[100.0, 360.0 / divisor]],
    }
    # A thousandth a second, and 300 or 360 tokens in it.
    text = to_markdown(report)
    assert "a million generated tokens at saturation: dense 3.33, sleb2 2.78" in text
