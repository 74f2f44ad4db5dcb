"""Generated models: configs, a byte tokenizer, random or absent weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kit import Kit, on_gpu
from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.convert.lists import manifest_of
from sleb_serve.manifest.schema import Manifest

LLAMA_2_7B: Mapping[str, int] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
}
LLAMA_2_70B: Mapping[str, int] = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 80,
    "vocab_size": 32000,
}
TINY: Mapping[str, int] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 8,
    "vocab_size": 512,
}
_CONV = ["conv", "full_attention", "conv", "conv", "full_attention", "conv"]
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
# Head sizes 64 or 128, because the kit's FlashAttention has no others.
ARCHITECTURES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", dict(TINY)),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**TINY, **_EXPERTS, "num_hidden_layers": 6, "head_dim": 64},
    ),
    # Short convolutions among attention layers. vLLM's CPU kernel is only correct for one head.
    "lfm2": (
        "Lfm2Config",
        {
            **TINY,
            "hidden_size": 128,
            "num_hidden_layers": 6,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "layer_types": _CONV,
            "block_auto_adjust_ff_dim": False,
            "block_dim": 128,
            "conv_dim": 128,
        },
    ),
}
_DEVIATION = 0.5


def tiny_model(kit: Kit, name: str) -> Path:
    """Create a tiny float32 model of one of `ARCHITECTURES`, once."""
    import torch
    import transformers

    folder = kit.work / f"tiny-{name}"
    if (folder / "model.safetensors").exists():
        return folder
    kind, values = ARCHITECTURES[name]
    config = getattr(transformers, kind)(
        **values, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than a new model's 0.02, so that removing a block changes the result.
            if parameter.dim() > 1:
                parameter.normal_(std=_DEVIATION / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def llama_7b(kit: Kit) -> Path:
    """Create a model with LLaMA-2-7B's shapes and random bfloat16 weights, 13.5 GB, once."""
    return _llama(kit, "llama-7b", TINY if kit.tiny else LLAMA_2_7B)


def llama_70b(kit: Kit, blocks: int) -> Path:
    """Create a model with LLaMA-2-70B's shapes but no weights; see `write_hollow`."""
    shape = {**(TINY if kit.tiny else LLAMA_2_70B), "num_hidden_layers": blocks}
    folder = kit.work / f"llama-70b-{blocks}"
    write_config(folder, shape)
    write_hollow(folder, shape)
    return folder


def _llama(kit: Kit, name: str, shape: Mapping[str, int]) -> Path:
    folder = kit.work / name
    if not (folder / "model.safetensors.index.json").exists():
        write_config(folder, shape)
        write_weights(folder, shape)
    return folder


def write_config(folder: Path, shape: Mapping[str, int]) -> None:
    """Write a Llama's config.json in bfloat16, and a tokenizer."""
    from transformers import LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    LlamaConfig(
        **shape,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """Create a tokenizer with one token per byte, which needs no vocabulary file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<unk>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def shards(shape: Mapping[str, int]) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Yield names and shapes of a Llama's tensors by file: four blocks each, then the rest."""
    d, f, v = (shape[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    kv = d // shape["num_attention_heads"] * shape["num_key_value_heads"]
    sizes = {
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
    }
    found: list[list[tuple[str, tuple[int, ...]]]] = []
    for block in range(shape["num_hidden_layers"]):
        if block % 4 == 0:
            found.append([])
        found[-1] += [(f"model.layers.{block}.{n}.weight", size) for n, size in sizes.items()]
    rest: list[tuple[str, tuple[int, ...]]] = [("model.norm.weight", (d,))]
    rest += [(f"{name}.weight", (v, d)) for name in ("model.embed_tokens", "lm_head")]
    return [*found, rest]


def write_weights(folder: Path, shape: Mapping[str, int]) -> None:
    """Write random bfloat16 weights, generated on the GPU if there is one."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    device = "cuda" if on_gpu() else "cpu"
    index, total = {}, 0
    for number, shard in enumerate(shards(shape)):
        name, values = f"model-{number:05d}.safetensors", {}
        for key, size in shard:
            value = torch.ones(size, dtype=torch.bfloat16)
            if len(size) > 1:
                drawn = torch.randn(size, device=device, dtype=torch.bfloat16)
                value = (drawn * (_DEVIATION / size[-1] ** 0.5)).cpu()
            values[key], index[key] = value, name
            total += value.nbytes
        save_file(values, folder / name, metadata={"format": "pt"})
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def write_hollow(folder: Path, shape: Mapping[str, int]) -> None:
    """Write sparse files without data; vLLM's load format `dummy` generates values."""
    header, end = {}, 0
    for key, size in (item for shard in shards(shape) for item in shard):
        begin, count = end, 2
        for length in size:
            count *= length
        end = begin + count
        header[key] = {"dtype": "BF16", "shape": list(size), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def pruned(folder: Path, removed: list[int]) -> tuple[Manifest, Checkpoint]:
    """Create a manifest of these blocks for the model."""
    checkpoint = open_checkpoint(str(folder))
    return manifest_of(str(folder), checkpoint, removed, "the kit"), checkpoint
