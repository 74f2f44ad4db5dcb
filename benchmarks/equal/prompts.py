"""Plugin against exported checkpoint, prompts only, with as many starts as an hour allows.

Usage: prompts.py MODEL M.json OUTPUT.jsonl [--starts 100] [--engine-args JSON]. What an engine's
prompts cost differs from one process to the next by more than the two engines do, so only many
starts can tell. Here each is a fork of one process that has imported vLLM already, which takes a
quarter of the time of a new one; what an engine allocates, it allocates anew. Each start warms up
once, then takes prompts by turns, who goes first changing from start to start. A line a start;
what is in OUTPUT already is kept and counted. Prints the ratio over all starts and its interval.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sleb_bench.engine import Engine
from sleb_bench.machine import machine
from sleb_bench.ratios import paired_ratio
from sleb_bench.variants import make_variants
from sleb_bench.workloads import workloads
from sleb_serve.checkpoint import open_checkpoint
from sleb_serve.manifest import read_manifest

ROUNDS, PROMPT_LENGTH = 2, 512
IMPORTED = ("vllm", "sleb_bench.backends", "vllm.v1.worker.cpu_model_runner")


def main() -> None:
    """Start, measure by turns, end; and again."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("manifest", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--starts", type=int, default=100)
    parser.add_argument("--engine-args", default='{"enforce_eager": true}')
    options = parser.parse_args()
    (workload,) = workloads(
        ["prefill"], prompt_length=PROMPT_LENGTH, batch=1, output_length=2, requests=1
    )
    arguments = {
        "model": options.model,
        "max_model_len": workload.longest,
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 2048,
        "disable_log_stats": False,
        **json.loads(options.engine_args),
    }
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    done = _lines(options.output)
    if not done:
        _append(options.output, {"arguments": arguments, "machine": machine()})
    checkpoint, manifest = open_checkpoint(options.model), read_manifest(options.manifest)
    vocabulary = int(checkpoint.config["vocab_size"])
    with tempfile.TemporaryDirectory() as scratch:
        _, plugin, export = make_variants(
            [manifest], checkpoint, arguments, ("export",), Path(scratch)
        )
        for start in range(len(done[1:]), options.starts):
            begin = time.perf_counter()
            with ExitStack() as stack:
                engines = {}
                for variant in (plugin, export):
                    log = options.output.with_name(f"{variant.name}.log")
                    engines[variant.name] = Engine(variant.name, variant.spec, log, context)
                    stack.callback(engines[variant.name].close)
                about = {name: engine.ready() for name, engine in engines.items()}
                samples: dict[str, list[Any]] = {name: [] for name in engines}
                for number in range(ROUNDS + 1):
                    order = list(engines) if (start + number) % 2 else list(engines)[::-1]
                    for name in order:
                        prompts = workload.prompts(vocabulary, f"{start} {number}")
                        sample = engines[name].measure(workload, prompts)
                        samples[name].append(asdict(sample))
            _append(
                options.output,
                {
                    "start": start,
                    "samples": samples,
                    "memory_bytes": {name: of["memory_bytes"] for name, of in about.items()},
                    "seconds": round(time.perf_counter() - begin, 1),
                },
            )
            _say(options.output, plugin.name, export.name)


def _say(path: Path, plugin: str, export: str) -> None:
    """The ratio of speeds, exported over plugin, so far; round 0 is the warm-up."""
    starts = [
        [
            theirs["elapsed_time"] / ours["elapsed_time"]
            for theirs, ours in zip(
                line["samples"][plugin][1:], line["samples"][export][1:], strict=True
            )
        ]
        for line in _lines(path)[1:]
    ]
    found = paired_ratio(starts)
    low, high = found.interval or (float("nan"), float("nan"))
    print(f"{len(starts)} starts: {found.mean:.4f} ({low:.4f} to {high:.4f})", flush=True)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _append(path: Path, entry: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
