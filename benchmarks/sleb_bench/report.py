"""Builds the report from raw records alone, so that it can be rebuilt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, median
from typing import Any

from sleb_bench.pace import FEWEST
from sleb_bench.pairs import Pair, are_apart, compared, cpu_ratio, pairs_of, speed_ratio, tokens_of
from sleb_bench.ratios import Ratio, against_ideal, outside_blocks, paired_ratio
from sleb_bench.slo import SHARE, bracket
from sleb_bench.variants import DENSE, is_beside, ranks
from sleb_serve.manifest.schema import perplexity_of
from sleb_serve.roofline.ideal import ideal_ratio
from sleb_serve.roofline.workload import Workload

Record = Mapping[str, Any]
_SERVED = (
    *("output_throughput", "request_throughput", "request_goodput", "prefix_cache_hit_rate"),
    *(f"p{p}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el") for p in (50, 90, 99)),
)
"""Fields of vllm bench that are averaged over rounds."""


def make_report(records: Sequence[Record]) -> dict[str, Any]:
    """Summarise the records of one run.

    Includes throughput of each variant, ratios of neighbouring turns with intervals, ideal ratios,
    start-up time and memory, the serving ladder, the reason for the end, and failures.
    """
    setting = next(record for record in records if record["record"] == "setting")
    variants = {
        record["variant"]: dict(record) for record in records if record["record"] == "variant"
    }
    loss = {r["variant"]: r["loss"] for r in records if r["record"] == "quality"}
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
        found = [r for r in records if r.get("workload", workload.name) == workload.name]
        if any(r["record"] == "sample" and r["round"] > 0 for r in found):
            report["workloads"][workload.name] = _workload(setting, variants, workload, found)
    served = [r for r in records if r["record"] == "serving" and r["round"]]
    report["serving"] = _serving(setting, variants, served) if served else None
    searched = [r for r in records if r["record"] == "slo"]
    report["slo"] = _slo(setting, variants, searched) if searched else None
    report["end"] = next((dict(r) for r in records if r["record"] == "end"), None)
    report["failures"] = [record["what"] for record in records if record["record"] == "failure"]
    return report


def _engines(starts: Sequence[Record]) -> dict[str, Any]:
    """Average the starts of one variant."""
    found: dict[str, Any] = {}
    for key in ("startup_time", "memory_bytes", "kv_cache_tokens", "max_concurrency"):
        values = [start[key] for start in starts if start.get(key) is not None]
        found[key] = fmean(values) if values else None
    return found


def _share(setting: Record, measure: str) -> float | None:
    """Return the head's share; in a prompt only the last token goes through the head."""
    share: float | None = setting["head_share"]
    return 0.0 if measure == "prefill" else share


def _workload(
    setting: Record, variants: Mapping[str, Record], workload: Workload, found: Sequence[Record]
) -> dict[str, Any]:
    """Summarise one workload from the samples and the engines' starts."""
    started = [record for record in found if record["record"] == "engine"]
    samples = [record for record in found if record["record"] == "sample"]
    share, ratios, own = _share(setting, workload.measure), [], {}
    for name, over in compared({name: v["over"] for name, v in variants.items()}):
        pairs = pairs_of(workload, samples, name, over)
        if not pairs:
            continue
        apart = are_apart(started, name, over)
        speed = speed_ratio(pairs, apart=apart)
        if over == DENSE and not is_beside(name):
            own[variants[name]["blocks"]] = speed
        entry = _ratio(setting, variants, name, over, speed, share)
        ratios.append({**entry, **_details(pairs, apart)})
    outside = None
    if own:
        # The largest pruning is the most informative.
        removed, speed = max(own.items())
        interval = outside_blocks(speed, setting["num_blocks"], removed)
        outside = {"interval": interval, "by_weights": share}
    medians = _medians(workload, [s for s in samples if s["round"] > 0], variants)
    return {
        "unit": workload.unit,
        "size": workload.describe(),
        **medians,
        "cost_per_million": _costs(setting, medians["throughput"]),
        "ratios": ratios,
        "outside_blocks": outside,
    }


def _costs(setting: Record, throughput: Mapping[str, float]) -> dict[str, float] | None:
    """Return the cost of a million tokens at a price per hour; None without a price."""
    price = setting["options"].get("gpu_hour")
    if price is None:
        return None
    return {name: 1e6 * price / (3600 * rate) for name, rate in throughput.items()}


def _medians(
    workload: Workload, samples: Sequence[Record], variants: Mapping[str, Record]
) -> dict[str, Any]:
    """Return medians of tokens/s, seconds per request and CPU-seconds per token."""
    found: dict[str, dict[str, float | None]] = {
        key: {} for key in ("throughput", "latency", "cpu_per_token")
    }
    for name in variants:
        own = [sample for sample in samples if sample["variant"] == name]
        if not own:
            continue
        tokens = [tokens_of(workload, sample) for sample in own]
        rates = [n / s["elapsed_time"] for n, s in zip(tokens, own, strict=True)]
        calls = [s["num_requests"] / workload.num_requests for s in own]
        times = [s["elapsed_time"] / n for n, s in zip(calls, own, strict=True)]
        used = [s["cpu_time"] / n for n, s in zip(tokens, own, strict=True) if s.get("cpu_time")]
        found["throughput"][name] = median(rates)
        found["latency"][name] = median(times)
        found["cpu_per_token"][name] = median(used) if used else None
    return found


def _ratio(
    setting: Record,
    variants: Mapping[str, Record],
    name: str,
    over: str,
    found: Ratio,
    share: float | None,
) -> dict[str, Any]:
    blocks, removed = variants[name]["blocks"], variants[over]["blocks"]
    ideal = None
    if over == DENSE and blocks and share is not None:
        ideal = ideal_ratio(setting["num_blocks"], blocks - removed, share)
    return {
        "variant": name,
        "over": over,
        "ratio": found.mean,
        "ratio_interval": found.interval,
        "samples": found.samples,
        "count": found.count,
        "ideal": ideal,
        **against_ideal(found, ideal),
    }


def _details(pairs: Sequence[Pair], apart: bool) -> dict[str, Any]:
    """Return a ratio's details: every pair, CPU time, and the ratio of quiet pairs alone."""
    cpu = cpu_ratio(pairs, apart=apart)
    quiet = [pair for pair in pairs if not pair.disturbed]
    enough = FEWEST <= len(quiet) < len(pairs)
    alone = speed_ratio(quiet, apart=apart) if enough else None
    return {
        "cpu_ratio": None if cpu is None else cpu.mean,
        "cpu_interval": None if cpu is None else cpu.interval,
        "quiet_ratio": None if alone is None else alone.mean,
        "quiet_interval": None if alone is None else alone.interval,
        "pairs": [asdict(pair) for pair in pairs],
    }


def _serving(
    setting: Record, variants: Mapping[str, Record], served: Sequence[Record]
) -> dict[str, Any]:
    points: dict[tuple[Any, Any], dict[str, list[Record]]] = {}
    for record in served:
        place = (record["request_rate"], record["max_concurrency"])
        points.setdefault(place, {}).setdefault(record["variant"], []).append(record["result"])
    share = _share(setting, "generate")
    saturation = _served_ratios(setting, variants, _best(served, "output_throughput"), share)
    return {
        "slo": setting["options"]["serving"]["slo"],
        "gpus": _gpus(setting, variants[DENSE]),
        "points": [
            {
                "request_rate": rate,
                "max_concurrency": concurrency,
                "variants": {name: _mean_result(of[name]) for name in variants if name in of},
            }
            for (rate, concurrency), of in points.items()
        ],
        "saturation": saturation,
        "cost_per_million": _costs(setting, saturation["best"]),
        "goodput": _served_ratios(setting, variants, _best(served, "request_goodput"), share),
    }


def _gpus(setting: Record, variant: Record) -> int | None:
    """Return the number of GPUs of a server; None without GPUs, and for servers that ran before."""
    if not setting["machine"]["gpus"] or setting["options"]["serving"].get("urls"):
        return None
    return ranks(variant["engine_arguments"])


def _slo(
    setting: Record, variants: Mapping[str, Record], searched: Sequence[Record]
) -> dict[str, Any]:
    """Return the highest rates that met the service level, and the lowest that did not."""
    found: dict[str, dict[str, Any]] = {}
    for name in variants:
        own = [record for record in searched if record["variant"] == name]
        if own:
            low, high = bracket([(r["request_rate"], r["met"]) for r in own])
            # A server that died during the search has no upper rate either.
            whole = low is not None and low >= own[-1]["capacity"]
            found[name] = {"rate": low, "not_at": high, "at_capacity": whole, "tried": len(own)}
    gains = []
    for name, over in compared({name: v["over"] for name, v in variants.items()}):
        of, under = found.get(name, {}), found.get(over, {})
        if of.get("rate") and under.get("rate"):
            edges = [
                of["rate"] / under["not_at"] if under["not_at"] else None,
                of["not_at"] / under["rate"] if of["not_at"] else None,
            ]
            ratio = of["rate"] / under["rate"]
            gains.append({"variant": name, "over": over, "ratio": ratio, "between": edges})
    return {
        "limits": setting["options"]["serving"]["slo"],
        "share": SHARE,
        "variants": found,
        "ratios": gains,
        "prefix_cache_hit_rate": max(r["result"]["prefix_cache_hit_rate"] for r in searched),
    }


def _mean_result(results: Sequence[Record]) -> dict[str, Any]:
    values = {key: fmean(result[key] for result in results) for key in _SERVED if key in results[0]}
    for key in ("completed", "failed"):
        values[key] = sum(result[key] for result in results)
    return values


def _best(served: Sequence[Record], key: str) -> dict[str, dict[int, float]]:
    """Return the best point by variant and round: throughput at saturation, or goodput."""
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
    for name, over in compared({name: v["over"] for name, v in variants.items()}):
        rounds = sorted(set(best.get(name, {})) & set(best.get(over, {})))
        values = [(best[name][number], best[over][number]) for number in rounds]
        if values and all(math.prod(pair) > 0 for pair in values):
            # Each server was started once.
            found = paired_ratio([[of / under for of, under in values]], apart=True)
            ratios.append(_ratio(setting, variants, name, over, found, share))
    return {
        "best": {name: fmean(best[name].values()) for name in variants if name in best},
        "ratios": ratios,
    }
