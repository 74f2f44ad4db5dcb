"""Compare plugin and exported checkpoint on prompts, with both engines in one process.

Usage: prompts.py MODEL M.json OUTPUT.jsonl [--starts 20] [--pairs 24] [--engine-args JSON]. The
cost of a prompt varies more between engine processes than between the two engines, and on a shared
machine also from second to second. So both are built in one process, in alternating order, and
process the same prompts in alternating turns of a second. The exported checkpoint runs in vLLM's
own model class; the plugin is registered but idle. A start is a fork of a process that has only
imported vLLM. OUTPUT gets one line per start; existing starts are kept. Prints the ratio of speeds
and its interval.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sleb_bench.machine import machine
from sleb_bench.ratios import paired_ratio
from sleb_bench.variants import make_variants
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.roofline.workload import Workload

PROMPT = Workload("prompt", "prefill", 1, 512, 1)
WARM_UP = 2
IMPORTED = ("vllm.entrypoints.llm", "vllm.v1.worker.cpu_model_runner")


def main() -> None:
    """Start, measure in turns, end; repeat."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("manifest", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--starts", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--engine-args", default='{"enforce_eager": true}')
    options = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    arguments = {
        "model": options.model,
        "max_model_len": PROMPT.longest,
        "enable_prefix_caching": False,
        "max_num_seqs": 1,
        **json.loads(options.engine_args),
    }
    checkpoint = open_checkpoint(options.model)
    vocabulary = int(checkpoint.config["vocab_size"])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    done = _lines(options.output)
    if not done:
        _append(options.output, {"arguments": arguments, "machine": machine()})
    with tempfile.TemporaryDirectory() as scratch:
        manifest = read_manifest(options.manifest)
        _, plugin, export = make_variants(
            [manifest], checkpoint, arguments, ("export",), Path(scratch)
        )
        variants = {v.name: dict(v.spec.arguments) for v in (plugin, export)}
        for start in range(len(done[1:]), options.starts):
            ours, theirs = context.Pipe()
            values = (theirs, variants, start, options.pairs, vocabulary)
            child = context.Process(target=measure, args=values)
            child.start()
            theirs.close()
            _append(options.output, {"start": start, **ours.recv()})
            child.join()
            _say(options.output, plugin.name, export.name)


def measure(
    pipe: Connection, variants: dict[str, Any], start: int, pairs: int, vocabulary: int
) -> None:
    """Run the child: build both engines, and measure seconds per prompt in turns."""
    from vllm import LLM, SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    built = list(variants)[:: -1 if start % 2 else 1]
    engines = {name: LLM(**variants[name]) for name in built}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-WARM_UP, pairs):
        (tokens,) = PROMPT.prompts(vocabulary, f"{start} {number}")
        for name in list(variants)[:: -1 if number % 2 else 1]:
            begin = time.perf_counter()
            engines[name].generate({"prompt_token_ids": tokens}, sampling, use_tqdm=False)
            if number >= 0:
                seconds[name].append(time.perf_counter() - begin)
    models = {name: engine.apply_model(_class_name)[0] for name, engine in engines.items()}
    pipe.send({"built": built, "models": models, "seconds": seconds})


def _class_name(model: Any) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _say(path: Path, plugin: str, export: str) -> None:
    """Return the ratio of speeds, exported over plugin."""
    starts = []
    for line in _lines(path)[1:]:
        pairs = zip(line["seconds"][plugin], line["seconds"][export], strict=True)
        starts.append([ours / theirs for ours, theirs in pairs])
    found, last = paired_ratio(starts), paired_ratio(starts[-1:]).mean
    interval = "" if found.interval is None else " ({:.4f} to {:.4f})".format(*found.interval)
    print(f"{len(starts)} starts: {found.mean:.4f}{interval}; the last {last:.4f}", flush=True)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _append(path: Path, entry: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
