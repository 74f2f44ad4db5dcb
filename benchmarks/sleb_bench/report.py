"""From raw records to the report; it reads nothing else, so a report can be made again."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from sleb_serve.manifest import perplexity_of

THROUGHPUT = {
    "prefill": ("prompt tokens/s", "total_input_tokens"),
    "decode": ("generated tokens/s", "total_output_tokens"),
}
_RESAMPLES = 10_000


def make_report(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum up the records of one run: throughput of both variants, ratio per round, ideal ratio."""
    setting = next(r for r in records if r["record"] == "setting")
    samples = [r for r in records if r["record"] == "sample" and r["round"] > 0]
    loss = {r["variant"]: r["loss"] for r in records if r["record"] == "quality"}
    report: dict[str, Any] = {key: value for key, value in setting.items() if key != "record"}
    report["engines"] = {
        r["variant"]: {k: v for k, v in r.items() if k not in {"record", "variant"}}
        for r in records
        if r["record"] == "engine"
    }
    report["workloads"] = {
        workload: _workload(setting, [s for s in samples if s["workload"] == workload], workload)
        for workload in THROUGHPUT
    }
    report["perplexity"] = {name: perplexity_of(value) for name, value in loss.items()}
    return report


def ideal_ratio(num_blocks: int, removed: int, head_share: float) -> float:
    """The speed-up if time went only to the blocks and the head: 1/(1 - (1-h)k/L)."""
    return 1 / (1 - (1 - head_share) * removed / num_blocks)


def geometric_mean_interval(
    starts: Sequence[Sequence[float]], level: float = 0.95
) -> tuple[float, float]:
    """Bootstrap percentile interval of the geometric mean of ratios, the same for the same ratios.

    Starts of the engines are drawn first and then rounds within each: two starts of one engine
    differ by more than two of its rounds do. With few starts it is a little too narrow, as every
    bootstrap of a small sample.

    Args:
        starts: the ratio of each round, start by start.
        level: how much of the bootstrap distribution it holds.
    """
    randomness = random.Random(0)
    logs = [[math.log(ratio) for ratio in rounds] for rounds in starts]
    means = []
    for _ in range(_RESAMPLES):
        drawn = [
            value
            for rounds in randomness.choices(logs, k=len(logs))
            for value in randomness.choices(rounds, k=len(rounds))
        ]
        means.append(math.fsum(drawn) / len(drawn))
    means.sort()
    tail = round(_RESAMPLES * (1 - level) / 2)
    return math.exp(means[tail]), math.exp(means[-tail - 1])


def _workload(
    setting: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], workload: str
) -> dict[str, Any]:
    by_round: dict[tuple[int, int], dict[str, float]] = {}
    for sample in samples:
        tokens = sample[THROUGHPUT[workload][1]]
        if workload == "decode":
            tokens -= sample["num_requests"]  # the first token of each belongs to the prefill
        place = (sample["start"], sample["round"])
        by_round.setdefault(place, {})[sample["variant"]] = tokens / sample["elapsed_time"]
    rounds = list(by_round.values())
    starts: dict[int, list[float]] = {}
    for (start, _), both in sorted(by_round.items()):
        starts.setdefault(start, []).append(both["pruned"] / both["dense"])
    ratios = [ratio for start in starts.values() for ratio in start]
    pruning = setting["pruning"]
    # In prefill only a prompt's last token goes through the head.
    share = setting["head_share"] if workload == "decode" else 0.0
    ratio = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
    ideal = (
        None
        if share is None
        else ideal_ratio(pruning["num_blocks"], len(pruning["removed"]), share)
    )
    return {
        "unit": THROUGHPUT[workload][0],
        "num_requests": samples[0]["num_requests"],
        "dense": _mean([both["dense"] for both in rounds]),
        "pruned": _mean([both["pruned"] for both in rounds]),
        "ratio": ratio,
        "ratio_interval": geometric_mean_interval(list(starts.values())),
        "ratio_rounds": list(starts.values()),
        "ideal": ideal,
        "efficiency": None if ideal is None else (ratio - 1) / (ideal - 1),
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def to_markdown(report: Mapping[str, Any]) -> str:
    """The report as a Markdown table with its setting beside it."""
    pruning, options, machine = report["pruning"], report["options"], report["machine"]
    removed, total = len(pruning["removed"]), pruning["num_blocks"]
    rows = [["", "dense", "pruned", "ratio (95 % interval)", "ideal", "efficiency"]]
    names = {"prefill": "prompt throughput", "decode": "generation throughput"}
    for workload, name in names.items():
        result = report["workloads"][workload]
        low, high = result["ratio_interval"]
        ideal, efficiency = result["ideal"], result["efficiency"]
        rows.append(
            [
                f"{name}, {result['unit']}",
                f"{result['dense']:.1f}",
                f"{result['pruned']:.1f}",
                f"{result['ratio']:.3f} ({low:.3f} to {high:.3f})",
                "" if ideal is None else f"{ideal:.3f}",
                "" if efficiency is None else f"{100 * efficiency:.0f} %",
            ]
        )
    cache = {name: engine["kv_cache_tokens"] for name, engine in report["engines"].items()}
    rows.append(
        [
            "KV cache, tokens",
            str(cache["dense"]),
            str(cache["pruned"]),
            f"{cache['pruned'] / cache['dense']:.3f}",
            f"{total / (total - removed):.3f}",
            "",
        ]
    )
    perplexity = report["perplexity"]
    if perplexity:
        dense, pruned = perplexity["dense"], perplexity["pruned"]
        ratio = f"{pruned / dense:.3f}"
        rows.append(["perplexity, held out", f"{dense:.2f}", f"{pruned:.2f}", ratio, "", ""])
    prompts = (
        f"{report['workloads']['prefill']['num_requests']} x {options['prompt_length']} tokens"
    )
    versions = report["engines"]["dense"]
    return "\n".join(
        [
            f"{report['model']}, {removed} of {total} blocks removed "
            f"(sleb{removed}-{report['pruning_digest'][:8]}), {options['starts']} starts of "
            f"{options['rounds']} interleaved rounds",
            "",
            *_table(rows),
            "",
            f"Prompts: {prompts}. Generation: batch {options['batch']}, "
            f"{options['output_length']} tokens each. Perplexity: {report['quality_text']}. "
            f"vLLM {versions['vllm']}, torch {versions['torch']}, {machine['cpu']}, "
            f"{machine['cores']} cores.",
            "",
        ]
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return [lines[0], rule, *lines[1:]]
