"""Compare the simulation of `sleb-serve plan --measured` with a measured run, dense and pruned.

Usage: measure.py MODEL M.json FOLDER [--blocks K] [--rounds 5] [--requests 64]. Two vLLM engines,
dense and pruned, take turns. First the step times are measured: batches of generation, prompts of
several lengths, and both together at longer contexts. FOLDER gets these as `records.jsonl`, which
`sleb-serve plan --measured FOLDER` reads. Then mixed prompts saturate each engine, with more
requests than can run at once and chunked prefill. `report.md` and `comparison.json` compare this
with the simulation.
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
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("manifest", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=64)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(options.manifest).prefix(options.blocks)
    checkpoint = check_model(options.model, manifest.pruning())
    arguments = {
        "model": str(checkpoint.path),
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
            _round(number, variants, engines, records, vocabulary, options.requests)
            records.save()
    _compare(options.folder, records)


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


def _round(
    number: int,
    variants: Sequence[Variant],
    engines: Mapping[str, Engine],
    records: Records,
    vocabulary: int,
    requests: int,
) -> None:
    """Measure each workload on each engine; round 0 warms up."""
    mixed = Workload("mixed", "generate", requests, LONGEST_PROMPT, OUTPUT)
    # The order alternates between rounds, so that drift favours no engine.
    order = list(variants) if number % 2 else list(variants)[::-1]
    for workload in (*STEPS, mixed) if number else STEPS:
        if workload is mixed:
            prompts = mixed_prompts(vocabulary, requests, number)
        else:
            prompts = workload.prompts(vocabulary, str(number))
        for variant in order:
            sample = engines[variant.name].measure(workload, [prompts])
            place = {"variant": variant.name, "start": 1, "round": number}
            values = {"workload": workload.name, **place, **asdict(sample)}
            if workload is mixed:
                values["prompt_lengths"] = list(map(len, prompts))
            records.add("mixed" if workload is mixed else "sample", values)
            print(number, workload.name, variant.name, f"{sample.elapsed_time:.3f}", flush=True)


def _compare(folder: Path, records: Records) -> None:
    """Compare predicted and measured tokens/s of each engine, and the gain from pruning.

    Each round has its own prompts and its own prediction; shows medians over rounds.
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
        f"at once and {TOKENS} tokens a step; medians of {len(speeds[DENSE])} rounds.",
        "",
        *table(rows),
    ]
    comparison = {"predicted_and_measured": speeds, "steps": steps}
    data = (json.dumps(comparison, indent=1) + "\n").encode()
    write_atomically(folder / "comparison.json", data)
    write_atomically(folder / "report.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main()
