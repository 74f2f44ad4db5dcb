"""A benchmark's records with round numbers."""

from __future__ import annotations

from typing import Any


def variant(name: str, blocks: int, over: str | None = "dense") -> dict[str, Any]:
    return {
        "record": "variant",
        "variant": name,
        "blocks": blocks,
        "over": over,
        "backend": "vllm",
        "pruning_digest": "0" * 64 if blocks else None,
        "weights_bytes": 1000 - 50 * blocks,
    }


DECODE = (1.0, 1.0, 2.0)
"""Decoding times of the pruned model: of the warm-up, and of its rounds."""
QUIET = {"others": 0.0, "steal": 0.0, "load": 0.5, "mhz": None, "disturbed": False}


def records(
    pruned_decode: tuple[float, ...] = DECODE, dense_decode: float | None = None
) -> list[dict[str, Any]]:
    """A run of two rounds with round numbers: decode gains 1.2 and 1.3, prefill 1.25 and 1.3."""
    quality = [
        {"record": "quality", "variant": "dense", "loss": 2.0},
        {"record": "quality", "variant": "sleb2", "loss": 3.0},
    ]
    return [
        setting(),
        variant("dense", 0, None),
        variant("sleb2", 2),
        *engines(),
        *quality,
        *samples(pruned_decode, dense_decode),
        {"record": "end", "why": "time over", "minutes": 1.5, "starts": 1},
    ]


def setting() -> dict[str, Any]:
    """Options and machine of the run."""
    sizes = {"num_requests": 4, "prompt_length": 100, "output_length": 1}
    decode = {**sizes, "prompt_length": 16, "output_length": 11}
    return {
        "record": "setting",
        "command": "sleb-serve bench m",
        "model": "m",
        "num_blocks": 10,
        "weights_sha256": "1" * 64,
        "options": {"precision": 2.0, "minutes": 1.0},
        "workloads": [
            {"name": "prefill", "measure": "prefill", **sizes, "unit": "prompt tokens/s"},
            {"name": "decode", "measure": "decode", **decode, "unit": "generated tokens/s"},
        ],
        "quality_text": "some text",
        "head_share": 0.5,
        "evaluation": {},
        "machine": {
            "cpu": "a cpu",
            "cores": 2,
            "gpus": [],
            "python": "3",
            "versions": {"vllm": "1", "torch": "2"},
        },
    }


def engines() -> list[dict[str, Any]]:
    """Start records of the two engines."""
    return [
        {
            "record": "engine",
            "start": 1,
            "variant": name,
            "process": "shared",
            "kv_cache_tokens": tokens,
            "startup_time": 2.0,
            "memory_bytes": 3e9,
            "max_concurrency": 4.0,
        }
        for name, tokens in (("dense", 1000), ("sleb2", 1250))
    ]


def samples(pruned_decode: tuple[float, ...], dense_decode: float | None) -> list[dict[str, Any]]:
    """A warm-up and two rounds of each workload with each variant.

    Dense decoding takes `dense_decode` seconds in each of as many rounds as the pruned one has.
    """
    times = {
        ("prefill", "dense"): (9.0, 2.0, 1.3),
        ("prefill", "sleb2"): (1.0, 1.6, 1.0),
        ("decode", "dense"): (9.0, 1.2, 2.6)
        if dense_decode is None
        else (dense_decode,) * len(pruned_decode),
        ("decode", "sleb2"): pruned_decode,
    }
    return [
        {
            "record": "sample",
            "workload": workload,
            "variant": name,
            "start": 1,
            "round": number,
            "elapsed_time": elapsed,
            "cpu_time": 2 * elapsed,
            "conditions": QUIET,
            "num_requests": 4,
            "total_input_tokens": 400 if workload == "prefill" else 64,
            "total_output_tokens": 4 if workload == "prefill" else 44,
        }
        for (workload, name), values in times.items()
        for number, elapsed in enumerate(values)
    ]
