"""Run `sleb-serve bench` on LLaMA-2's shapes, and convert its report to results."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kit import Kit, engine_arguments, on_gpu, sleb_serve, spread
from made import LLAMA_2_7B, LLAMA_2_70B, TINY, llama_7b, llama_70b

# 64 sequences of 192 tokens need 6.44 GB of the dense model's KV cache.
SHARED = {"kv_cache_memory_bytes": 6_600_000_000, "gpu_memory_utilization": 0.1}
ALONE = {"gpu_memory_utilization": 0.9}
SCHEDULER = {"max_num_batched_tokens": 8192, "max_num_seqs": 64}
"""The batch of the paper, so that few CUDA graphs are captured."""
TENTH, FIFTH, THIRD = 4, 7, 10
"""Removed blocks of 32, rounded as by `sleb-serve select --remove 0.1` and so on."""
ROOM = 12 << 30
"""GPU memory that the 70B-shaped blocks leave for KV cache, activations and graphs, beside vLLM's
own tenth."""


def step_speed(kit: Kit) -> None:
    """Compare dense and 7 of 32 removed, in turns."""
    _bench(kit, llama_7b(kit), FIFTH, SHARED, "--minutes", "2")


def step_exported(kit: Kit) -> None:
    """Compare 7 of 32 removed by the plugin with the same exported, in turns."""
    _bench(kit, llama_7b(kit), FIFTH, SHARED, "--beside", "export", "--minutes", "2")


def step_depths(kit: Kit) -> None:
    """Compare dense, 4 and 10 of 32 removed, in turns."""
    counts = "1,3" if kit.tiny else f"{TENTH},{THIRD}"
    _bench(kit, llama_7b(kit), THIRD, SHARED, "--blocks", counts, "--minutes", "2")


def step_capacity(kit: Kit) -> None:
    """Measure start and KV cache of dense and 7 removed, one at a time with nearly all memory."""
    more = ("--one-at-a-time", "--minutes", "0.1")
    _bench(kit, llama_7b(kit), FIFTH, ALONE, *more, workloads="prefill")


def step_large(kit: Kit) -> None:
    """Compare as many LLaMA-2-70B blocks as fit, dense and a fifth removed, one at a time."""
    _large(kit, {})


def step_fp8(kit: Kit) -> None:
    """Do the same with weights converted to FP8 at load time."""
    _large(kit, {"quantization": "fp8"})


def _large(kit: Kit, more: Mapping[str, Any]) -> None:
    blocks = TINY["num_hidden_layers"] if kit.tiny else blocks_that_fit(_memory())
    folder = llama_70b(kit, blocks)
    kit.tell("blocks", blocks=blocks, of=LLAMA_2_70B["num_hidden_layers"])
    arguments = {**ALONE, "load_format": "dummy", **more}
    _bench(kit, folder, -(-blocks // 5), arguments, "--one-at-a-time", "--minutes", "0.1")


def _memory() -> int:
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if on_gpu() else 0


def blocks_that_fit(memory: int) -> int:
    """Return how many LLaMA-2-70B blocks fit a GPU's bytes with a small KV cache."""
    shape = LLAMA_2_70B
    d, f = shape["hidden_size"], shape["intermediate_size"]
    kv = d // shape["num_attention_heads"] * shape["num_key_value_heads"]
    block = 2 * (2 * d * d + 2 * d * kv + 3 * d * f)
    ends = 2 * 2 * shape["vocab_size"] * d
    fit = (ALONE["gpu_memory_utilization"] * memory - ROOM - ends) // block
    return max(5, min(shape["num_hidden_layers"], int(fit)))


def _bench(
    kit: Kit,
    model: Path,
    removed: int,
    arguments: Mapping[str, Any],
    *more: str,
    workloads: str = "official",
) -> None:
    """Run the command; raise SystemExit with its exit code if it fails."""
    output = kit.work / kit.step
    values = {"dtype": "bfloat16", **arguments, **SCHEDULER, **engine_arguments()}
    count, sizes = LLAMA_2_7B["num_hidden_layers"], ["--prompt-length", "2048"]
    config = json.loads((model / "config.json").read_text())
    count = config["num_hidden_layers"]
    if kit.tiny:
        removed = min(removed, 3)
        for name in ("kv_cache_memory_bytes", "gpu_memory_utilization"):
            values.pop(name, None)
        values |= {"enforce_eager": True, "dtype": "float32"}
        workloads, sizes = "prefill,decode", ["--prompt-length", "64", "--batch", "4"]
        more = tuple(_quick(more))
    command = sleb_serve(
        *("bench", str(model), "--removal-list", json.dumps(spread(count, removed))),
        *("-o", str(output), "--starts", "1", "--perplexity-sequences", "0"),
        *("--workloads", workloads, "--engine-args", json.dumps(values), *sizes, *more),
    )
    print(" ".join(command), flush=True)
    child = subprocess.Popen(command)
    try:
        code = child.wait()
    finally:
        # Stopped at the step's limit, it gets the same signal and writes what it has measured.
        child.wait()
        _keep(kit, output)
    if code:
        raise SystemExit(code)


def _keep(kit: Kit, output: Path) -> None:
    """Copy the records and the engines' logs, and convert the report to results."""
    for log in output.glob("*.log"):
        shutil.copy(log, kit.output / f"{kit.step}.{log.name}")
    if (output / "records.jsonl").exists():
        shutil.copy(output / "records.jsonl", kit.output / f"{kit.step}.records.jsonl")
    if (output / "report.json").exists():
        _tell(kit, json.loads((output / "report.json").read_text()))


def _quick(options: Sequence[str]) -> list[str]:
    """Return the options with a twentieth of a minute to measure."""
    found = list(options)
    if "--minutes" in found:
        found[found.index("--minutes") + 1] = "0.05"
    return found


def _tell(kit: Kit, report: Mapping[str, Any]) -> None:
    for name, variant in report["variants"].items():
        kit.tell(
            "engine",
            variant=name,
            removed=variant["blocks"],
            **{key: variant.get(key) for key in ("startup_time", "kv_cache_tokens")},
            weights_bytes=variant.get("weights_bytes"),
        )
    for name, workload in report["workloads"].items():
        kit.tell("throughput", workload=name, unit=workload["unit"], **_rates(workload))
        for entry in workload["ratios"]:
            kept = {key: value for key, value in entry.items() if key not in _DETAILS}
            kit.tell("ratio", workload=name, **kept)


_DETAILS = frozenset({"pairs"})


def _rates(workload: Mapping[str, Any]) -> dict[str, Any]:
    return {"tokens_s": workload["throughput"], "latency_s": workload["latency"]}
