"""Roofline plan: the predicted gain from pruning on any GPU, from a model's sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sleb_serve.errors import SlebError
from sleb_serve.roofline.gpu import MEMORY_USED, Gpu
from sleb_serve.roofline.model import Model, kv_tokens
from sleb_serve.roofline.step import Roofline
from sleb_serve.roofline.workload import OFFICIAL
from sleb_serve.utils.markdown import table

_PAPER = ("llama-2-70b", "A100-80G", 2, 16)
_PAPER_PROMPT_MS = (1718.4, 1364.1)
_PAPER_TOKENS_S = (299.0, 381.0)


@dataclass(frozen=True)
class Prediction:
    """One pruning: ``removed`` blocks; seconds for the prompt, tokens/s of generation.

    ``weights`` is in bytes on all GPUs; ``kv_tokens`` is the capacity of the KV cache.
    """

    removed: int
    prompt: float
    generation: float
    weights: float
    kv_tokens: int


def default_removed(model: Model) -> tuple[int, ...]:
    """Return the default numbers of removed blocks: 10, 20 and 30 %, rounded up."""
    return tuple(math.ceil(model.num_blocks * tenths / 10) for tenths in (1, 2, 3))


def predict(model: Model, gpu: Gpu, gpus: int, removed: int, split: str = "tensor") -> Prediction:
    """The paper's two workloads: a prompt of 2,048 tokens, and 64 sequences of 64 + 128 tokens."""
    step = Roofline(model, gpu, gpus, removed, split)
    prompt_load, load = OFFICIAL
    batch, length = load.num_requests, prompt_load.prompt_length

    def time(new: int, context: int, sequences: int) -> float:
        return step(new, sequences, new * context, sequences * context)

    # Causal: a token attends to half the prompt on average.
    total = time(batch * load.prompt_length, load.prompt_length // 2, batch)
    for number in range(1, load.output_length):
        total += time(batch, load.prompt_length + number, batch)
    weights = model.weights(removed)
    return Prediction(
        removed,
        time(length, length // 2, 1),
        batch * load.output_length / total,
        weights,
        tokens_beside(model, gpu, gpus, removed),
    )


def free_memory(model: Model, gpu: Gpu, gpus: int, removed: int) -> float:
    """Return the bytes for KV cache on all GPUs; negative if the weights do not fit."""
    return gpu.memory * MEMORY_USED * gpus - model.weights(removed)


def tokens_beside(model: Model, gpu: Gpu, gpus: int, removed: int) -> int:
    """Return the KV cache tokens on all GPUs, ignoring activations; 0 if weights do not fit."""
    free = free_memory(model, gpu, gpus, removed) / model.share(removed)
    return kv_tokens(free, [block.cache for block in model.blocks])


def check_plan(model: Model, tp: int, removed: Sequence[int]) -> None:
    """Refuse impossible configurations.

    Raises:
        SlebError: the heads cannot be divided, or too many blocks are to be removed.
    """
    if tp < 1 or model.heads % tp:
        raise SlebError(f"tp={tp}: {model.name} has {model.heads} heads, which it must divide")
    for count in removed:
        if not 0 <= count < model.num_blocks:
            raise SlebError(f"removed={count}: {model.name} has {model.num_blocks} blocks")


def plan(
    model: Model, gpu: Gpu, tp: int, removed: Sequence[int], split: str = "tensor"
) -> tuple[list[Prediction], dict[str, Any] | None]:
    """Return predictions, dense first, and their errors against the paper's four numbers.

    Raises:
        SlebError: as for `check_plan`.
    """
    check_plan(model, tp, removed)
    counts = dict.fromkeys((0, *removed))
    found = [predict(model, gpu, tp, count, split) for count in counts]
    paper = None
    if (model.name, gpu.name, tp) == _PAPER[:3]:
        dense, pruned = found[0], predict(model, gpu, tp, _PAPER[3], split)
        paper = {
            "prompt_ms": _against([dense.prompt * 1e3, pruned.prompt * 1e3], _PAPER_PROMPT_MS),
            "tokens_s": _against([dense.generation, pruned.generation], _PAPER_TOKENS_S),
        }
    return found, paper


def _against(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, Any]:
    """Compare predicted and measured numbers, dense and pruned, with relative errors."""
    ratios = [values[1] / values[0] for values in (predicted, measured)]
    return {
        "predicted": list(predicted),
        "paper": list(measured),
        "errors": [p / m - 1 for p, m in zip(predicted, measured, strict=True)],
        "ratio_predicted": ratios[0],
        "ratio_paper": ratios[1],
        "ratio_error": ratios[0] / ratios[1] - 1,
    }


def about_model(model: Model) -> dict[str, Any]:
    """Return the sizes of a model as JSON values: totals, and each type of block."""
    return {
        "name": model.name,
        "num_blocks": model.num_blocks,
        "hidden": model.hidden,
        "heads": model.heads,
        "vocabulary": model.vocabulary,
        "parameters": model.parameters,
        "weights": model.stored,
        "blocks": [
            {
                "number": number,
                "parameters": block.all_parameters,
                "weights": block.all_stored,
                "experts": block.experts,
                "active_experts": block.active,
                "kv_bytes_per_token": block.cache.token,
                "window": block.cache.window,
                "state_bytes": block.cache.state,
            }
            for block, number in model.kinds.items()
        ],
    }


def describe_plan(
    model: Model,
    gpu: Gpu,
    tp: int,
    found: Sequence[Prediction],
    paper: Mapping[str, Any] | None,
    split: str = "tensor",
) -> str:
    """Format the plan as a table."""
    dense = found[0]
    head = ("removed", "prompt 2,048, ms", "ratio", "64 x (64 + 128), tokens/s", "ratio")
    rows: list[tuple[str, ...]] = [(*head, "weights, GB", "KV cache, tokens")]
    for p in found:
        rows.append(
            (
                str(p.removed),
                f"{p.prompt * 1e3:.1f}",
                f"{dense.prompt / p.prompt:.3f}",
                f"{p.generation:.0f}",
                f"{p.generation / dense.generation:.3f}",
                f"{p.weights / 1e9:.1f}",
                f"{p.kv_tokens}" if p.kv_tokens else "does not fit",
            )
        )
    lines = [f"{bounds(model, gpu, tp, split)}: bounds by the roofline", "", *table(rows)]
    if paper is not None:
        rows = [("against the paper", "predicted", "paper", "error")]
        for key, name in (("prompt_ms", "prompt, ms"), ("tokens_s", "generation, tokens/s")):
            of = paper[key]
            for i, which in enumerate(("dense", f"{_PAPER[3]} removed")):
                values = (of["predicted"][i], of["paper"][i])
                error = f"{100 * of['errors'][i]:+.0f} %"
                rows.append((f"{name}, {which}", f"{values[0]:.1f}", f"{values[1]:.1f}", error))
            ratios = (f"{of['ratio_predicted']:.3f}", f"{of['ratio_paper']:.3f}")
            rows.append((f"{name}, pruned / dense", *ratios, f"{100 * of['ratio_error']:+.1f} %"))
        lines += ["", *table(rows)]
    return "\n".join(lines)


def bounds(model: Model, gpu: Gpu, tp: int, split: str) -> str:
    """Describe the planned configuration in one line."""
    return (
        f"{model.name} on {tp} x {gpu.name} ({gpu.flops / 1e12:.4g} Tflop/s, "
        f"{gpu.bandwidth / 1e9:.4g} GB/s each), {model.parameters / 1e9:.2f} billion parameters "
        f"in {model.stored / 1e9:.1f} GB"
        f"{'' if split == 'tensor' or tp == 1 else ', one GPU after another'}"
    )
