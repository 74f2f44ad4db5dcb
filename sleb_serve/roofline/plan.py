"""Roofline plan: what pruning will give on a GPU that is not at hand, from the config alone.

A step takes, in each block, as long as its arithmetic or its memory traffic needs, whichever is
more, plus two all-reduces with tensor parallelism. These are lower bounds of times: kernels reach a
part of the peak, which ``compute`` and ``memory`` efficiencies below 1 stand for. Ratios of pruned
over dense hardly depend on them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sleb_serve.checkpoint.decoder import MAX_BLOCKS, count_of
from sleb_serve.checkpoint.files import read_json
from sleb_serve.errors import SlebError
from sleb_serve.roofline.workload import OFFICIAL
from sleb_serve.utils import strict_json
from sleb_serve.utils.markdown import table

_BYTES = 2  # of a weight or of a number in the KV cache: float16 or bfloat16
_MEMORY_USED = 0.9  # of a GPU's memory, as vLLM's gpu_memory_utilization
_MAX_SIZE = 1 << 31
HERE = "here"
SPLITS = ("tensor", "layers")
# Model types whose MLP has three matrices (gate, up, down), and two.
_GATED = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "olmo2", "smollm3"})
_PLAIN = frozenset({"opt", "starcoder2"})


@dataclass(frozen=True)
class Gpu:
    """Peak rates of one device: 16-bit flop/s (dense), memory and link bytes/s, memory bytes.

    ``latency`` is that of one all-reduce in seconds.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    link: float
    latency: float = 10e-6

    def slowed(self, compute: float, memory: float) -> Gpu:
        """With the parts of the peaks that kernels reach."""
        return replace(self, flops=self.flops * compute, bandwidth=self.bandwidth * memory)


# From NVIDIA's data sheets; links are one direction of NVLink, or of PCIe 4.0 x16.
GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        gpu.name: gpu
        for gpu in (
            Gpu("A100-40G", 312e12, 1555e9, 40e9, 300e9),
            Gpu("A100-80G", 312e12, 2039e9, 80e9, 300e9),
            Gpu("H100-80G", 989e12, 3350e9, 80e9, 450e9),
            Gpu("H200", 989e12, 4800e9, 141e9, 450e9),
            Gpu("L40S", 362e12, 864e9, 48e9, 32e9),
            Gpu("L4", 121e12, 300e9, 24e9, 32e9),
        )
    }
)


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder-only model."""

    name: str
    num_blocks: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    mlp_matrices: int = 3

    @property
    def block_parameters(self) -> int:
        """Of one decoder block, norms and biases apart."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return attention + self.mlp_matrices * self.hidden * self.intermediate

    @property
    def kv_bytes(self) -> int:
        """Of KV cache for one token in one block."""
        return 2 * self.kv_heads * self.head_dim * _BYTES


# As in the models' published configs.
SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            Shape("llama-2-7b", 32, 4096, 32, 32, 128, 11008, 32000),
            Shape("llama-2-13b", 40, 5120, 40, 40, 128, 13824, 32000),
            Shape("llama-2-70b", 80, 8192, 64, 8, 128, 28672, 32000),
            Shape("llama-3-8b", 32, 4096, 32, 8, 128, 14336, 128256),
            Shape("llama-3-70b", 80, 8192, 64, 8, 128, 28672, 128256),
        )
    }
)
_PAPER = ("llama-2-70b", "A100-80G", 2, 16)
_PAPER_PROMPT_MS = (1718.4, 1364.1)
_PAPER_TOKENS_S = (299.0, 381.0)


@dataclass(frozen=True)
class Prediction:
    """One pruning: ``removed`` blocks; seconds for the prompt, tokens/s of generation.

    ``weights`` in bytes on all GPUs, ``kv_tokens`` what is left for KV cache holds.
    """

    removed: int
    prompt: float
    generation: float
    weights: float
    kv_tokens: int


def shape_of(config: Mapping[str, Any], name: str) -> Shape:
    """The sizes in a config.json.

    Raises:
        SlebError: a kind of model whose blocks this plan does not know.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _GATED | _PLAIN:
        shown = kind if isinstance(kind, str) else strict_json.short(kind)
        raise SlebError(
            f"no plan for model type {shown}: known are {', '.join(sorted(_GATED | _PLAIN))}"
        )

    def size(key: str, default: int | None = None) -> int:
        value = config.get(key) or default
        return strict_json.integer(value, f"{name}: config.json: {key}", 1, _MAX_SIZE)

    heads, hidden = size("num_attention_heads"), size("hidden_size")
    return Shape(
        name,
        strict_json.integer(count_of(config), f"{name}: config.json: layers", 1, MAX_BLOCKS),
        hidden,
        heads,
        size("num_key_value_heads", heads),
        size("head_dim", max(hidden // heads, 1)),
        size("ffn_dim" if kind == "opt" else "intermediate_size"),
        size("vocab_size"),
        3 if kind in _GATED else 2,
    )


def default_removed(shape: Shape) -> tuple[int, ...]:
    """The numbers of blocks that are planned for: 10, 20 and 30 %, rounded up."""
    return tuple(math.ceil(shape.num_blocks * tenths / 10) for tenths in (1, 2, 3))


def read_shape(model: str) -> Shape:
    """A shape by its name in `SHAPES`, or of a checkpoint folder, a config.json or a hub id.

    Raises:
        SlebError: there is none.
    """
    if model in SHAPES:
        return SHAPES[model]
    path = Path(model)
    if path.is_file():
        return shape_of(read_json(path), path.parent.name)
    from sleb_serve.checkpoint.hub import open_checkpoint

    checkpoint = open_checkpoint(model)
    return shape_of(checkpoint.config, path.resolve().name if path.is_dir() else model)


def step_time(
    shape: Shape, gpu: Gpu, tp: int, *, blocks: int, new: int, context: int, sequences: int
) -> float:
    """Seconds of one forward pass.

    Args:
        shape: the model.
        gpu: each of the devices.
        tp: how many share every matrix.
        blocks: how many blocks are run.
        new: tokens that go through, of all sequences.
        context: tokens of KV cache that each new token attends to, on average.
        sequences: how many; each one's last token goes through the head.
    """
    dim = shape.heads * shape.head_dim
    arithmetic = 2 * new * shape.block_parameters + 4 * new * context * dim
    # The keys and values that are there are read once for a sequence, whatever its new tokens.
    traffic = shape.block_parameters * _BYTES + sequences * context * shape.kv_bytes
    block = max(arithmetic / gpu.flops, traffic / gpu.bandwidth) / tp
    if tp > 1:
        payload = new * shape.hidden * _BYTES
        block += 2 * (2 * (tp - 1) / tp * payload / gpu.link + gpu.latency)
    head = shape.hidden * shape.vocabulary
    top = max(2 * sequences * head / gpu.flops, head * _BYTES / gpu.bandwidth) / tp
    return blocks * block + top


def predict(shape: Shape, gpu: Gpu, gpus: int, removed: int, split: str = "tensor") -> Prediction:
    """The paper's two workloads: a prompt of 2,048 tokens, and 64 sequences of 64 + 128 tokens.

    With ``split="layers"`` each GPU holds some of the layers and they work one after another, as
    Transformers spreads a model by itself.
    """
    blocks = shape.num_blocks - removed
    tp = gpus if split == "tensor" else 1
    prompt_load, load = OFFICIAL
    batch, length = load.num_requests, prompt_load.prompt_length
    # Causal: a token attends to half of the prompt on average.
    prompt = step_time(shape, gpu, tp, blocks=blocks, new=length, context=length // 2, sequences=1)
    total = step_time(
        shape,
        gpu,
        tp,
        blocks=blocks,
        new=batch * load.prompt_length,
        context=load.prompt_length // 2,
        sequences=batch,
    )
    for number in range(1, load.output_length):
        context = load.prompt_length + number
        total += step_time(
            shape, gpu, tp, blocks=blocks, new=batch, context=context, sequences=batch
        )
    weights = (blocks * shape.block_parameters + 2 * shape.hidden * shape.vocabulary) * _BYTES
    tokens = kv_tokens(shape, gpu, gpus, blocks, weights)
    return Prediction(removed, prompt, batch * load.output_length / total, weights, tokens)


def kv_tokens(shape: Shape, gpu: Gpu, gpus: int, blocks: int, weights: float) -> int:
    """Tokens of KV cache beside `weights` bytes, on all GPUs; 0 where the weights do not fit.

    Activations are left out, and every token is kept in every block, as without sliding windows.
    """
    free = gpu.memory * _MEMORY_USED * gpus - weights
    return max(0, math.floor(free / (blocks * shape.kv_bytes)))


def plan(
    shape: Shape, gpu: Gpu, tp: int, removed: Sequence[int], split: str = "tensor"
) -> tuple[list[Prediction], dict[str, Any] | None]:
    """Predictions, dense first, and how far off they are from the paper's four numbers.

    Raises:
        SlebError: heads that cannot be divided, or more blocks to remove than there are.
    """
    if tp < 1 or shape.heads % tp:
        raise SlebError(f"tp={tp}: {shape.name} has {shape.heads} heads, which it must divide")
    for count in removed:
        if not 0 <= count < shape.num_blocks:
            raise SlebError(f"removed={count}: {shape.name} has {shape.num_blocks} blocks")
    counts = dict.fromkeys((0, *removed))
    found = [predict(shape, gpu, tp, count, split) for count in counts]
    paper = None
    if (shape.name, gpu.name, tp) == _PAPER[:3]:
        dense, pruned = found[0], predict(shape, gpu, tp, _PAPER[3], split)
        paper = {
            "prompt_ms": _against([dense.prompt * 1e3, pruned.prompt * 1e3], _PAPER_PROMPT_MS),
            "tokens_s": _against([dense.generation, pruned.generation], _PAPER_TOKENS_S),
        }
    return found, paper


def _against(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, Any]:
    """Predicted and measured, dense and pruned, with relative errors."""
    ratios = [values[1] / values[0] for values in (predicted, measured)]
    return {
        "predicted": list(predicted),
        "paper": list(measured),
        "errors": [p / m - 1 for p, m in zip(predicted, measured, strict=True)],
        "ratio_predicted": ratios[0],
        "ratio_paper": ratios[1],
        "ratio_error": ratios[0] / ratios[1] - 1,
    }


def describe_plan(
    shape: Shape,
    gpu: Gpu,
    tp: int,
    found: Sequence[Prediction],
    paper: Mapping[str, Any] | None,
    split: str = "tensor",
) -> str:
    """The plan as a table for people."""
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
    lines = [
        f"{shape.name} on {tp} x {gpu.name} ({gpu.flops / 1e12:.4g} Tflop/s, "
        f"{gpu.bandwidth / 1e9:.4g} GB/s each), 16-bit weights: bounds by the roofline"
        f"{'' if split == 'tensor' or tp == 1 else ', one GPU after another'}",
        "",
        *table(rows),
    ]
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
