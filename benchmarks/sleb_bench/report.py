"""From raw records to the report; it reads nothing else, so a report can be made again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from sleb_bench.ratios import efficiency, line_fit, paired_ratio
from sleb_bench.variants import DENSE, is_beside, uncapped
from sleb_serve.manifest.schema import perplexity_of
from sleb_serve.roofline.ideal import ideal_ratio
from sleb_serve.roofline.workload import Workload

Record = Mapping[str, Any]
_SERVED = (
    *("output_throughput", "request_throughput", "request_goodput", "prefix_cache_hit_rate"),
    *(f"p{p}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el") for p in (50, 90, 99)),
)
"""What is averaged over rounds of vllm bench's own fields."""


def make_report(records: Sequence[Record]) -> dict[str, Any]:
    """Sum up the records of one run.

    Throughput of each variant, ratios within rounds with their intervals, the ideal ratios, what
    the starts cost and hold, the serving ladder, and what failed.
    """
    setting = next(record for record in records if record["record"] == "setting")
    variants = {
        record["variant"]: dict(record) for record in records if record["record"] == "variant"
    }
    loss = {r["variant"]: r["loss"] for r in records if r["record"] == "quality"}
    # Round 0 is the warm-up.
    samples = [r for r in records if r["record"] == "sample" and r["round"]]
    report = {key: value for key, value in setting.items() if key != "record"}
    report["variants"] = {
        name: {
            **{key: value for key, value in variant.items() if key not in {"record", "variant"}},
            **_engines(
                [
                    record
                    for record in records
                    if record["record"] in {"engine", "server"} and record["variant"] == name
                ]
            ),
            "perplexity": perplexity_of(loss.get(name)),
        }
        for name, variant in variants.items()
    }
    report["workloads"] = {}
    for entry in setting["workloads"]:
        workload = Workload(**{key: value for key, value in entry.items() if key != "unit"})
        found = [r for r in samples if r["workload"] == workload.name]
        if found:
            report["workloads"][workload.name] = _workload(setting, variants, workload, found)
    served = [r for r in records if r["record"] == "serving" and r["round"]]
    report["serving"] = _serving(setting, variants, served) if served else None
    report["failures"] = [record["what"] for record in records if record["record"] == "failure"]
    return report


def _engines(starts: Sequence[Record]) -> dict[str, Any]:
    """What the starts of one variant took and gave, on average."""
    found: dict[str, Any] = {}
    for key in ("startup_time", "memory_bytes", "kv_cache_tokens", "max_concurrency"):
        values = [start[key] for start in starts if start.get(key) is not None]
        found[key] = fmean(values) if values else None
    return found


def _pairs(variants: Mapping[str, Record]) -> Iterator[tuple[str, str]]:
    """Which variant's ratio is taken over which."""
    for name, variant in variants.items():
        if variant["over"] is not None:
            yield name, variant["over"]
        if (base := uncapped(name)) is not None:
            yield base, name  # what the larger KV cache adds to the cheaper steps


def _share(setting: Record, measure: str) -> float | None:
    """The head's share; of a prompt only the last token goes through the head."""
    share: float | None = setting["head_share"]
    return 0.0 if measure == "prefill" else share


def _workload(
    setting: Record, variants: Mapping[str, Record], workload: Workload, samples: Sequence[Record]
) -> dict[str, Any]:
    rates: dict[str, dict[tuple[int, int], float]] = {}
    for sample in samples:
        tokens = workload.tokens(sample["total_input_tokens"], sample["total_output_tokens"])
        place = (sample["start"], sample["round"])
        rates.setdefault(sample["variant"], {})[place] = tokens / sample["elapsed_time"]
    share = _share(setting, workload.measure)
    ratios = []
    for name, over in _pairs(variants):
        starts: dict[int, list[float]] = {}
        for place, rate in sorted(rates.get(name, {}).items()):
            if place in rates.get(over, {}):
                starts.setdefault(place[0], []).append(rate / rates[over][place])
        if starts:
            ratios.append(_ratio(setting, variants, name, over, list(starts.values()), share))
    return {
        "unit": workload.unit,
        "size": workload.describe(),
        "throughput": {name: fmean(rates[name].values()) for name in variants if name in rates},
        "latency": {
            name: fmean(s["elapsed_time"] for s in samples if s["variant"] == name)
            for name in variants
            if name in rates
        },
        "ratios": ratios,
        "outside_blocks": _outside_blocks(setting, variants, rates, share),
    }


def _ratio(
    setting: Record,
    variants: Mapping[str, Record],
    name: str,
    over: str,
    starts: Sequence[Sequence[float]],
    share: float | None,
) -> dict[str, Any]:
    found = paired_ratio(starts)
    blocks, removed = variants[name]["blocks"], variants[over]["blocks"]
    ideal = None
    if over == DENSE and blocks and share is not None:
        ideal = ideal_ratio(setting["num_blocks"], blocks - removed, share)
    return {
        "variant": name,
        "over": over,
        "ratio": found.mean,
        "ratio_interval": found.interval,
        "ratio_starts": [list(rounds) for rounds in starts],
        "ideal": ideal,
        "efficiency": None if ideal is None else efficiency(found.mean, ideal),
        "efficiency_interval": None
        if ideal is None or found.interval is None
        else [efficiency(edge, ideal) for edge in found.interval],
    }


def _outside_blocks(
    setting: Record,
    variants: Mapping[str, Record],
    rates: Mapping[str, Mapping[tuple[int, int], float]],
    share: float | None,
) -> dict[str, Any] | None:
    """What part of the dense model's time is not in its blocks: as measured, and by the weights.

    Time per token is fitted as a + b (L - k) over the prunings of one engine, start by start: a is
    what no removed block saves. It is what the ideal ratio does not know of.
    """
    own = [n for n, v in variants.items() if v["over"] in {None, DENSE} and not is_beside(n)]
    starts = {place[0] for name in own for place in rates.get(name, {})}
    shares = []
    for start in sorted(starts):
        points = [
            (setting["num_blocks"] - variants[name]["blocks"], 1 / rate)
            for name in own
            for place, rate in rates.get(name, {}).items()
            if place[0] == start
        ]
        fit = line_fit(points)
        if fit is not None:
            shares.append(fit[0] / (fit[0] + fit[1] * setting["num_blocks"]))
    if not shares:
        return None
    return {"measured": fmean(shares), "starts": shares, "by_weights": share}


def _serving(
    setting: Record, variants: Mapping[str, Record], served: Sequence[Record]
) -> dict[str, Any]:
    points: dict[tuple[Any, Any], dict[str, list[Record]]] = {}
    for record in served:
        place = (record["request_rate"], record["max_concurrency"])
        points.setdefault(place, {}).setdefault(record["variant"], []).append(record["result"])
    share = _share(setting, "generate")
    return {
        "slo": setting["options"]["serving"]["slo"],
        "points": [
            {
                "request_rate": rate,
                "max_concurrency": concurrency,
                "variants": {name: _mean_result(of[name]) for name in variants if name in of},
            }
            for (rate, concurrency), of in points.items()
        ],
        "saturation": _served_ratios(
            setting,
            variants,
            _best(served, "output_throughput"),
            share,
        ),
        "goodput": _served_ratios(setting, variants, _best(served, "request_goodput"), share),
    }


def _mean_result(results: Sequence[Record]) -> dict[str, Any]:
    values = {key: fmean(result[key] for result in results) for key in _SERVED if key in results[0]}
    for key in ("completed", "failed"):
        values[key] = sum(result[key] for result in results)
    return values


def _best(served: Sequence[Record], key: str) -> dict[str, dict[int, float]]:
    """The best of any point, by variant and round: throughput at saturation, or goodput."""
    best: dict[str, dict[int, float]] = {}
    for record in served:
        of = best.setdefault(record["variant"], {})
        of[record["round"]] = max(of.get(record["round"], 0.0), record["result"][key])
    return best


def _served_ratios(
    setting: Record,
    variants: Mapping[str, Record],
    best: Mapping[str, Mapping[int, float]],
    share: float | None,
) -> dict[str, Any]:
    ratios = []
    for name, over in _pairs(variants):
        rounds = sorted(set(best.get(name, {})) & set(best.get(over, {})))
        values = [(best[name][number], best[over][number]) for number in rounds]
        if values and all(math.prod(pair) > 0 for pair in values):
            starts = [[of / under for of, under in values]]
            ratios.append(_ratio(setting, variants, name, over, starts, share))
    return {
        "best": {name: fmean(best[name].values()) for name in variants if name in best},
        "ratios": ratios,
    }
