"""Measure a step of healing: tokens/s, share of the matrix peak, peak memory over inference.

Usage: speed.py FOLDER [--steps N]. SmolLM2 with 6 of 30 blocks removed, four sequences of 512
tokens at once, with and without checkpointing, and the whole command `heal` for two steps. Each
measurement runs in its own process, with peak memory from the operating system.

Inference is one forward pass of the dense model over the same batch in the same dtype: weights,
all logits in the model's dtype, no KV cache. `over_inference` is healing's peak divided by
inference's plus the adapters and Adam's state. Records go to FOLDER/speed.jsonl.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import subprocess
import sys
import tempfile
import time
from array import array
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from sleb_bench.demo_model import demo_model
from sleb_bench.machine import machine
from sleb_serve import read_manifest

ROOT = Path(__file__).resolve().parent.parent.parent
REMOVED = (5, 12, 16, 17, 18, 25)
FOUND = ROOT / "benchmarks" / "records" / "evaluation" / "manifest.json"
AT_ONCE, LENGTH, RANK = 4, 512, 32


def main() -> None:
    """Measure each mode in turn."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    model = str(demo_model(ROOT / ".cache" / "demo"))
    with (options.folder / "speed.jsonl").open("a") as records:
        records.write(json.dumps({"machine": machine()}, default=str) + "\n")
        inference = beside = 0
        record: dict[str, Any]
        for way in ("inference", "checkpointing", "keeping", "command"):
            context = multiprocessing.get_context("spawn")
            with context.Pool(1) as pool:
                if way == "command":
                    record = {"way": way, "peak_bytes": pool.apply(command, (model,))}
                else:
                    record = pool.apply(measured, (model, way, options.steps))
            if way == "inference":
                inference = record["peak_bytes"]
            else:
                beside = record.get("adapter_and_adam_bytes", beside)
                record["over_inference"] = record["peak_bytes"] / (inference + beside)
            records.write(json.dumps(record) + "\n")
            records.flush()
            print(json.dumps(record), flush=True)


def measured(model: str, way: str, steps: int) -> dict[str, Any]:
    """Run the batch in one mode, in this process."""
    import torch

    from sleb_serve.checkpoint.hub import open_checkpoint
    from sleb_serve.data.training import Passage
    from sleb_serve.healing.distillation import learn, predicted, tensors
    from sleb_serve.healing.twin import Twin, adaptable
    from sleb_serve.models.loading import has_fast, load_model
    from sleb_serve.roofline.device import device_here

    checkpoint = open_checkpoint(model)
    dtype = "bfloat16" if has_fast("bfloat16") else "float32"
    whole: Any = load_model(checkpoint, dtype)
    whole.requires_grad_(False)
    draw = random.Random(0)
    text = [
        Passage(array("i", (draw.randrange(49_000) for _ in range(LENGTH))), b"\1" * LENGTH)
        for _ in range(AT_ONCE)
    ]
    about: dict[str, Any] = {"way": way, "dtype": dtype, "batch": [AT_ONCE, LENGTH], "rank": RANK}
    if way == "inference":
        ids, _ = tensors(text, "cpu")
        with torch.inference_mode():
            whole(ids, use_cache=False)
        return about | {"peak_bytes": peak()}
    kept = [block for block in range(checkpoint.num_blocks) if block not in REMOVED]
    names = adaptable(whole, checkpoint, kept, None)
    twin = Twin(whole, REMOVED, names, rank=RANK, seed=0, checkpointing=way == "checkpointing")
    adam = torch.optim.AdamW(twin.factors.values(), lr=1e-5)
    learn(twin, text, predicted(text))
    seconds = []
    for _ in range(steps):
        adam.step()  # not timed: `heal` steps once for several batches
        adam.zero_grad()
        begun = time.perf_counter()
        learn(twin, text, predicted(text))
        seconds.append(time.perf_counter() - begun)
    trained = sum(factor.numel() for factor in twin.factors.values())
    rate = AT_ONCE * LENGTH / median(seconds)
    needed = flops(whole, len(kept), trained, way == "checkpointing")
    held = peak()  # before measuring the machine itself
    peak_flops = device_here().flops
    return about | {
        "seconds": seconds,
        "tokens_s": rate,
        "flops_per_token": needed,
        "matrix_peak_flops": peak_flops,
        "share_of_peak": rate * needed / peak_flops,
        "adapter_and_adam_bytes": 12 * trained,
        "peak_bytes": held,
    }


def command(model: str) -> int:
    """Run `heal` for two steps with their validations, and return its peak bytes."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "m.json"
        replace(read_manifest(FOUND).prefix(len(REMOVED)), evaluation={}).write(manifest)
        words = ["heal", model, "-m", str(manifest), "-o", f"{folder}/healed.json"]
        words += ["--text", "python-docs", "--held-out", "4", "--batch-size", "8"]
        words += ["--tokens", str(2 * 8 * LENGTH)]
        subprocess.run([sys.executable, "-m", "sleb_serve.cli", *words], check=True)
    return peak(resource.RUSAGE_CHILDREN)


def flops(model: Any, kept: int, trained: int, again: bool) -> int:
    """Return flop per token in matrix products with weights, without attention's own and the rest.

    Forward: 2 per weight for either model. Backward: 2 for the student's inputs, and 4 per
    trainable parameter. Head: 2 for either model and 2 backward.
    """
    layers = model.model.layers
    blocks = sum(p.numel() for n, p in layers.named_parameters() if "lora" not in n)
    part = blocks * kept // len(layers)
    head = model.get_output_embeddings().weight.numel()
    student = 2 * (2 if again else 1) * (part + trained) + 2 * part + 4 * trained
    return int(2 * blocks + student + 6 * head)


def peak(who: int = resource.RUSAGE_SELF) -> int:
    """Return the peak bytes of this process, or of its largest child."""
    return 1024 * resource.getrusage(who).ru_maxrss


if __name__ == "__main__":
    main()
