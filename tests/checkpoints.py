"""Derived checkpoints: physically pruned, quantised, and LoRA adapters."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_LAYER = re.compile(r"(model\.layers\.)(\d+)(\..*)")
_LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")
_GROUP = 32


def compacted(source: Path, folder: Path, removed: Sequence[int]) -> Path:
    """A copy for stock vLLM without the removed layers, the rest renumbered."""
    config = _config(source)
    kept = [i for i in range(config["num_hidden_layers"]) if i not in removed]
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        match = _LAYER.fullmatch(name)
        if match is None:
            tensors[name] = tensor
        elif int(match[2]) in kept:
            tensors[f"{match[1]}{kept.index(int(match[2]))}{match[3]}"] = tensor
    return _write(source, folder, {**config, "num_hidden_layers": len(kept)}, tensors)


def int8(source: Path, folder: Path) -> Path:
    """Weights in int8 by output channel, activations by token: compressed-tensors' W8A8."""
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    return _channelwise(source, folder, "int-quantized", weights, torch.int8, 127)


def fp8(source: Path, folder: Path) -> Path:
    """Weights in float8 by output channel, activations by token: compressed-tensors' FP8."""
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    return _channelwise(source, folder, "float-quantized", weights, torch.float8_e4m3fn, 448)


def _channelwise(
    source: Path,
    folder: Path,
    name: str,
    weights: dict[str, Any],
    dtype: torch.dtype,
    largest: int,
) -> Path:
    activations = {**weights, "strategy": "token", "dynamic": True}
    quantisation = {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**weights, "dynamic": False},
                "input_activations": activations,
            }
        },
    }
    tensors = dict(_unquantised(source))
    for linear, weight in _linears(source):
        scale = weight.abs().amax(dim=1, keepdim=True) / largest
        scaled = weight / scale
        if dtype is torch.int8:
            scaled = scaled.round()
        tensors[linear + "weight"] = scaled.clamp(-largest, largest).to(dtype)
        tensors[linear + "weight_scale"] = scale
    config = {**_config(source), "quantization_config": quantisation}
    return _write(source, folder, config, tensors)


def gptq(source: Path, folder: Path) -> Path:
    """Weights in 4 bits with groups of 32 inputs, packed as GPTQ does."""
    quantisation = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": _GROUP,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
    }
    tensors = dict(_unquantised(source))
    for linear, weight in _linears(source):
        levels, scales = _four_bits(weight)
        tensors[linear + "qweight"] = _packed(levels.T, 0, range(8))
        tensors[linear + "scales"] = scales.T.contiguous()
        # A zero point of 8, stored less one.
        zeros = torch.full_like(scales.T, 7, dtype=torch.int64)
        tensors[linear + "qzeros"] = _packed(zeros, 1, range(8))
        tensors[linear + "g_idx"] = (torch.arange(weight.shape[1]) // _GROUP).int()
    config = {**_config(source), "quantization_config": quantisation}
    return _write(source, folder, config, tensors)


def awq(source: Path, folder: Path) -> Path:
    """Weights in 4 bits with groups of 32 inputs, packed as AWQ does."""
    quantisation = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": _GROUP,
        "zero_point": True,
        "version": "gemm",
    }
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = dict(_unquantised(source))
    for linear, weight in _linears(source):
        levels, scales = _four_bits(weight)
        tensors[linear + "qweight"] = _packed(levels.T, 1, order)
        tensors[linear + "scales"] = scales.T.contiguous()
        zeros = torch.full_like(scales.T, 8, dtype=torch.int64)
        tensors[linear + "qzeros"] = _packed(zeros, 1, order)
    config = {**_config(source), "quantization_config": quantisation}
    return _write(source, folder, config, tensors)


def lora(source: Path, folder: Path, rank: int = 4) -> Path:
    """A random LoRA adapter for every layer's q_proj and down_proj, as PEFT saves one."""
    targets = ("self_attn.q_proj", "mlp.down_proj")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if name.endswith(tuple(f"{target}.weight" for target in targets)):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            out, inner = weight.shape
            a = torch.randn(rank, inner, generator=generator) / inner**0.5
            tensors[f"{stem}.lora_A.weight"] = a
            tensors[f"{stem}.lora_B.weight"] = 0.3 * torch.randn(out, rank, generator=generator)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [target.split(".")[1] for target in targets],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merge_lora(model: Any, adapter: Path) -> Any:
    """Add an adapter of `lora` to a Transformers model's weights; the model is changed."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{stem}.lora_A.weight" in tensors:
                product = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
                parameter += product.to(parameter.dtype)
    return model


def _config(source: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    return config


def _write(source: Path, folder: Path, config: dict[str, Any], tensors: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    for file in source.glob("*.json"):
        if not file.name.startswith("model."):
            shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(config))
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _unquantised(source: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in load_file(source / "model.safetensors").items():
        if not _LINEAR.fullmatch(name):
            yield name, tensor


def _linears(source: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in load_file(source / "model.safetensors").items():
        if _LINEAR.fullmatch(name):
            yield name.removesuffix("weight"), tensor.float()


def _four_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels 0 to 15 around 8 (out, in), and scales (out, groups)."""
    out, inner = weight.shape
    groups = weight.reshape(out, inner // _GROUP, _GROUP)
    scales = groups.abs().amax(dim=2) / 7
    levels = (groups / scales[:, :, None]).round().clamp(-8, 7) + 8
    return levels.reshape(out, inner).long(), scales


def _packed(levels: torch.Tensor, dim: int, order: Sequence[int]) -> torch.Tensor:
    """Eight levels to an int32 along `dim`: the one at ``order[k]`` in bits 4k to 4k + 3."""
    eights = levels.unflatten(dim, (-1, 8))
    packed = sum(eights.select(dim + 1, index) << (4 * k) for k, index in enumerate(order))
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
