"""Serving features that need a GPU or its kernels: sleep mode, FP8 KV cache, LoRA adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from equality import Answers, answers_of, arguments, compared, same_tokens, with_transformers
from kit import Kit, on_gpu
from made import tiny_model

REMOVED = (2, 5)
RANK = 4


def step_sleep(kit: Kit) -> None:
    """Check that a sleeping pruned model frees memory and answers the same after waking up."""
    folder = tiny_model(kit, "llama")
    for level in (1, 2):
        with (
            kit.telling("sleep", level=level) as found,
            _engine(folder, dtype="bfloat16", enable_sleep_mode=True) as llm,
        ):
            before, awake = answers_of(llm), _free()
            llm.sleep(level)
            found["freed_bytes"] = _free() - awake
            llm.wake_up()
            if level == 2:
                # Level 2 drops the weights; reloading must restore the pruned model's.
                llm.collective_rpc("reload_weights")
            after = answers_of(llm)
            found |= compared(after, before, None)
            found["same_tokens"] = after[1] == before[1]


def step_fp8_cache(kit: Kit) -> None:
    """Run a pruned model with an 8-bit KV cache; answers are close but not equal."""
    folder = tiny_model(kit, "llama")
    # The kit's FlashAttention has no 8-bit kernels.
    values = {"kv_cache_dtype": "fp8", "attention_config": {"backend": "TRITON_ATTN"}}
    wanted = with_transformers(folder, REMOVED, "bfloat16")
    dense = with_transformers(folder, (), "bfloat16")
    with (
        kit.telling("FP8 KV cache") as found,
        _engine(folder, dtype="bfloat16", **values) as llm,
    ):
        found |= compared(answers_of(llm), wanted, dense)
        found["kv_cache_blocks"] = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks


def step_lora(kit: Kit) -> None:
    """Compare a dense model's adapter on the pruned one with merged weights."""
    from vllm.lora.request import LoRARequest

    folder = tiny_model(kit, "llama")
    adapter, merged = _adapter(folder, kit.work / "lora"), kit.work / "lora-merged"
    _merge(folder, adapter, merged)
    plain = with_transformers(folder, REMOVED, "float32")
    wanted = with_transformers(merged, REMOVED, "float32")
    values = {"dtype": "float32", "enforce_eager": True, "enable_lora": True, "max_lora_rank": 8}
    with kit.telling("LoRA") as found, _engine(folder, **values) as llm:
        request = LoRARequest("adapter", 1, str(adapter))
        # vLLM returns no prompt log-probabilities with an adapter.
        answers: Answers = answers_of(llm, prompts=False, lora_request=request)
        found["greedy_equal"] = same_tokens(answers, wanted)
        found["greedy_equal_to_no_adapter"] = same_tokens(answers, plain)


@contextmanager
def _engine(folder: Path, **own: Any) -> Iterator[Any]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(**arguments(folder, REMOVED, own))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def _free() -> int:
    import torch

    return int(torch.cuda.mem_get_info()[0]) if on_gpu() else 0


def _adapter(source: Path, folder: Path) -> Path:
    """Write a random adapter of every block's q_proj and down_proj in PEFT's format."""
    import torch
    from safetensors.torch import load_file, save_file

    targets = ("self_attn.q_proj", "mlp.down_proj")
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if stem.endswith(targets):
            rows, columns = weight.shape
            for end, size in (("lora_A", (RANK, columns)), ("lora_B", (rows, RANK))):
                drawn = torch.randn(size, generator=draw) / size[1] ** 0.5
                tensors[f"base_model.model.{stem}.{end}.weight"] = drawn
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": [target.rpartition(".")[2] for target in targets],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _merge(source: Path, adapter: Path, target: Path) -> None:
    """Write the dense checkpoint with the adapter merged."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target, dirs_exist_ok=True)
    factors = load_file(adapter / "adapter_model.safetensors")
    weights = load_file(source / "model.safetensors")
    for name in weights:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in factors:
            product = factors[f"{stem}.lora_B.weight"] @ factors[f"{stem}.lora_A.weight"]
            weights[name] = weights[name] + product
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
