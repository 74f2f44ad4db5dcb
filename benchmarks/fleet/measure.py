"""Compare the simulation of `sleb-serve plan --measured` with a measured run, dense and pruned.

Usage: measure.py MODEL M.json FOLDER [--blocks K] [--rounds 4] [--loads 5] [--requests 32]
[--dtype float32]. Two vLLM engines, dense and pruned, take turns. First the step times are
measured: batches of generation, prompts of several lengths, and both together at longer contexts.
FOLDER gets these as `records.jsonl`, which `sleb-serve plan --measured FOLDER` reads. Then mixed
prompts saturate each engine several times a round, with more requests than can run at once and
chunked prefill. `report.md` and `comparison.json` compare this with the simulation.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from sleb_bench.engine import Engine, Host
from sleb_bench.machine import machine
from sleb_bench.ratios import paired_ratio
from sleb_bench.records import Records
from sleb_bench.variants import DENSE, Variant, make_variants
from sleb_serve.manifest.binding import check_model
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.roofline.measured import read_measured
from sleb_serve.roofline.simulation import Limits, Request, simulate
from sleb_serve.roofline.workload import Prompts, Workload
from sleb_serve.utils.atomic_io import write_atomically
from sleb_serve.utils.markdown import table

TOKENS, SEQUENCES, LONGEST = 512, 16, 1024
STEPS = (
    *(Workload(f"decode-{n}", "decode", n, 16, 33) for n in (1, 2, 4, 8, 16)),
    *(Workload(f"prefill-{n}", "prefill", 1, n, 1) for n in (32, 64, 128, 256, 512, 960)),
    Workload("prefill-16x32", "prefill", SEQUENCES, 32, 1),
    Workload("generate-8x256", "generate", 8, 256, 33),
    Workload("generate-16x448", "generate", SEQUENCES, 448, 17),
)
"""Workloads for fitting the step time."""
SHORTEST_PROMPT, LONGEST_PROMPT, OUTPUT = 32, 480, 48
"""Lengths of the mixed load, in tokens."""


def main() -> None:
    """Measure, predict, compare."""
    options = _options()
    options.folder.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(options.manifest).prefix(options.blocks)
    checkpoint = check_model(options.model, manifest.pruning())
    arguments = {
        "model": str(checkpoint.path),
        "dtype": options.dtype,
        "max_model_len": LONGEST,
        "max_num_batched_tokens": TOKENS,
        "max_num_seqs": SEQUENCES,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "enforce_eager": True,
    }
    variants = make_variants([manifest], checkpoint, arguments, (), options.folder)
    records = Records(options.folder)
    records.add(
        "setting",
        {
            "command": shlex.join(["benchmarks/fleet/measure.py", *sys.argv[1:]]),
            "model": manifest.model.id,
            "num_blocks": checkpoint.num_blocks,
            "weights_sha256": manifest.model.weights_sha256,
            "workloads": [{**asdict(workload), "unit": workload.unit} for workload in STEPS],
            "machine": machine(),
        },
    )
    for variant in variants:
        records.add("variant", variant.about())
    vocabulary = int(checkpoint.decoder_config["vocab_size"])
    with ExitStack() as stack:
        engines = {}
        host = Host({}, options.folder / "engines.log")
        stack.callback(host.close)
        for variant in variants:
            about = host.start(variant.name, variant.spec)
            records.add("engine", {"start": 1, "variant": variant.name, **about})
            engines[variant.name] = Engine(host, variant.name)
        for number in range(options.rounds + 1):
            order = list(variants) if number % 2 else list(variants)[::-1]
            for workload in STEPS:
                prompts = workload.prompts(vocabulary, str(number))
                _measure("sample", workload, prompts, number, order, engines, records)
            # Round 0 warms up.
            for load in range(options.loads if number else 0):
                prompts = mixed_prompts(vocabulary, options.requests, 1000 * number + load)
                mixed = Workload("mixed", "generate", len(prompts), LONGEST_PROMPT, OUTPUT)
                _measure("mixed", mixed, prompts, number, order, engines, records)
                order.reverse()  # so that drift favours no engine
            records.save()
    _compare(options.folder, records)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("manifest", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--loads", type=int, default=5, help="mixed loads a round")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--dtype", default="auto", help="float32 where bfloat16 is emulated")
    return parser.parse_args()


def mixed_prompts(vocabulary: int, requests: int, seed: int) -> Prompts:
    """Return prompts of random tokens and lengths."""
    source = random.Random(seed)
    return [
        [
            source.randrange(vocabulary)
            for _ in range(source.randint(SHORTEST_PROMPT, LONGEST_PROMPT))
        ]
        for _ in range(requests)
    ]


def _measure(
    kind: str,
    workload: Workload,
    prompts: Prompts,
    number: int,
    order: Sequence[Variant],
    engines: Mapping[str, Engine],
    records: Records,
) -> None:
    """Measure one workload on each engine; records of this kind hold the prompts' lengths."""
    for variant in order:
        sample = engines[variant.name].measure(workload, [prompts])
        values = {"workload": workload.name, "variant": variant.name, "start": 1, "round": number}
        lengths = {"prompt_lengths": list(map(len, prompts))} if kind == "mixed" else {}
        records.add(kind, {**values, **asdict(sample), **lengths})
        print(number, workload.name, variant.name, f"{sample.elapsed_time:.3f}", flush=True)


def _compare(folder: Path, records: Records) -> None:
    """Compare predicted and measured tokens/s of each engine, and the gain from pruning.

    Each load has its own prompts and its own prediction; shows medians over the loads, and the
    interval of the measured ratio.
    """
    mixed = [entry for entry in records.entries if entry["record"] == "mixed"]
    speeds: dict[str, list[tuple[float, float]]] = {}
    steps: dict[str, Any] = {}
    for found in read_measured([folder]):
        limits = Limits(TOKENS, SEQUENCES, found.kv_tokens, found.block / 2, 1)
        steps[found.name] = {"fit_error": found.error, **asdict(found.step)}
        speeds[found.name] = []
        for run in (entry for entry in mixed if entry["variant"] == found.name):
            requests = [Request(0.0, length, OUTPUT) for length in run["prompt_lengths"]]
            seconds = max(simulate(requests, limits, found.step).last)
            tokens = run["total_output_tokens"]
            speeds[found.name].append((tokens / seconds, tokens / run["elapsed_time"]))
    (pruned,) = (name for name in speeds if name != DENSE)
    pairs = zip(speeds[pruned], speeds[DENSE], strict=True)
    speeds[f"{pruned} / {DENSE}"] = [(a[0] / b[0], a[1] / b[1]) for a, b in pairs]
    rows: list[tuple[str, ...]] = [
        ("generated tokens/s", "predicted", "measured", "predicted / measured")
    ]
    for name, values in speeds.items():
        form = ".1f" if name in steps else ".3f"
        columns = [[p for p, _ in values], [m for _, m in values], [p / m for p, m in values]]
        cells = (format(median(c), f) for c, f in zip(columns, (form, form, ".3f"), strict=True))
        rows.append((name, *cells))
    lines = [
        f"A closed load of {len(mixed[0]['prompt_lengths'])} requests, prompts of "
        f"{SHORTEST_PROMPT} to {LONGEST_PROMPT} tokens, {OUTPUT} tokens out; at most {SEQUENCES} "
        f"at once and {TOKENS} tokens a step; medians of {len(speeds[DENSE])} loads.",
        "",
        *table(rows),
        "",
        _measured_ratio([measured for _, measured in speeds[f"{pruned} / {DENSE}"]]),
    ]
    comparison = {"predicted_and_measured": speeds, "steps": steps}
    data = (json.dumps(comparison, indent=1) + "\n").encode()
    write_atomically(folder / "comparison.json", data)
    write_atomically(folder / "report.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


def _measured_ratio(ratios: Sequence[float]) -> str:
    """Describe the measured ratio by the benchmark's own estimator."""
    found = paired_ratio([ratios])
    low, high = found.interval or (0.0, float("inf"))
    return (
        f"Measured ratio, by the benchmark's estimator: {found.mean:.3f} ({low:.3f} to {high:.3f})."
    )


if __name__ == "__main__":
    main()
