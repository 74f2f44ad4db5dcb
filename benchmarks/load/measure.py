"""Compare load time and resident memory of pruned and dense models, in interleaved starts.

Usage: measure.py FOLDER [--rounds N]. FOLDER gets a random Llama of 2.2 GB (kept for the next run),
`records.jsonl` with every start, and `report.md`. Each start is a separate process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sleb_bench.ratios import paired_ratio
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.manifest.binding import bind
from sleb_serve.manifest.schema import Manifest, Removal
from sleb_serve.serving.command import engine_arguments

REMOVED = (4, 7, 11, 14, 17)
LAYERS = 22


def main() -> None:
    """Create the model if needed, start in turns, write records and report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--child", metavar="OVERRIDES", help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = options.folder.resolve() / "model"
    if options.child is not None:
        print(json.dumps(_load(model, json.loads(options.child))))
        return
    if not model.exists():
        _make(model)
    checkpoint = open_checkpoint(str(model))
    manifest = Manifest(bind(str(model), checkpoint), tuple(Removal(b) for b in REMOVED))
    pruned = engine_arguments(manifest.pruning(), checkpoint)
    kept, skipped = checkpoint.tensor_bytes(frozenset(REMOVED)) or (0, 0)
    records = []
    # Round 0 warms the page cache and is not counted.
    for index in range(options.rounds + 1):
        order = [("dense", {}), ("pruned", pruned)]
        for variant, overrides in order if index % 2 else reversed(order):
            record = {"round": index, "variant": variant, **_start(options.folder, overrides)}
            print(json.dumps(record), flush=True)
            records.append(record)
    (options.folder / "records.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records)
    )
    report = _report(records, kept, skipped)
    (options.folder / "report.md").write_text(report)
    print(report)


def _make(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="600MB")


def _start(folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, str(folder), "--child", json.dumps(overrides)]
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _load(model: Path, overrides: dict[str, Any]) -> dict[str, float]:
    from vllm import LLM
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    found: dict[str, float] = {}
    load = CPUModelRunner.load_model

    def timed(self: Any, *args: Any, **kwargs: Any) -> None:
        before, start = _resident(), time.perf_counter()
        load(self, *args, **kwargs)
        found["load_seconds"] = time.perf_counter() - start
        found["resident_bytes"] = _resident() - before

    CPUModelRunner.load_model = timed
    start = time.perf_counter()
    LLM(
        str(model),
        **overrides,
        max_model_len=128,
        enforce_eager=True,
        skip_tokenizer_init=True,
    )
    return {**found, "ready_seconds": time.perf_counter() - start}


def _resident() -> int:
    """Return the bytes of this process's own memory, without mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


def _report(records: list[dict[str, Any]], kept: int, skipped: int) -> str:
    share = kept / (kept + skipped)
    lines = [
        f"Random Llama, {LAYERS} blocks, {(kept + skipped) / 1e9:.2f} GB in bfloat16, "
        f"{len(REMOVED)} blocks removed; {max(r['round'] for r in records)} interleaved rounds "
        f"after one that warms the page cache. Weights kept: {share:.3f} of all bytes. "
        f"vllm-cpu {version('vllm-cpu')}, torch {version('torch')}, {platform.processor()}, "
        f"{os.cpu_count()} cores.",
        "",
        "| | dense | pruned | ratio (95 % interval) | over the share kept |",
        "|---|---|---|---|---|",
    ]
    for key, title, unit in (
        ("load_seconds", "load time, s", 1),
        ("resident_bytes", "resident memory after loading, GB", 1e9),
        ("ready_seconds", "time until ready, s", 1),
    ):
        values = {
            variant: [r[key] for r in records if r["variant"] == variant and r["round"] > 0]
            for variant in ("dense", "pruned")
        }
        ratios = [p / d for d, p in zip(values["dense"], values["pruned"], strict=True)]
        found = paired_ratio([[ratio] for ratio in ratios], apart=True)
        mean, (low, high) = found.mean, found.interval or (math.nan, math.nan)
        dense, pruned = (sum(v) / len(v) / unit for v in values.values())
        lines.append(
            f"| {title} | {dense:.2f} | {pruned:.2f} | {mean:.3f} ({low:.3f} to {high:.3f}) "
            f"| {100 * (mean / share - 1):+.1f} % |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
