"""Tiny configurations of many architectures, for the equality matrix: six blocks, Llama eight."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Tiny:
    """A tiny model: its Transformers config, and settings for Transformers and vLLM.

    Attributes:
        config: the config's class in Transformers.
        values: its arguments.
        auto: the auto class that makes the model.
        dtype: what weights are stored, and both compute, in.
        engine: arguments of `vllm.LLM` that it needs.
        architecture: what config.json names, where Transformers has no class of that name: its
            own class differs in nothing but the name.
    """

    config: str
    values: dict[str, Any]
    auto: str = "AutoModelForCausalLM"
    dtype: str = "float32"
    engine: dict[str, Any] = field(default_factory=dict)
    architecture: str = ""


AS_MADE = ("A_log", ".D", "dt_bias", "e_score_correction_bias")
"""Name suffixes of parameters without random weights.

A recurrence needs sensible ones, and vLLM's CPU build ignores some biases of routers.
"""

VOCABULARY = 512
"""A multiple of 64, so that vLLM pads no rows and parameters can be counted."""

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Heads of 32: vLLM's CPU attention has no kernel for smaller ones.
LLAMA: dict[str, Any] = {
    **COMMON,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
HEAD: dict[str, Any] = {**LLAMA, "head_dim": 32}
GLM_MOE: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
SLIDING: dict[str, Any] = {
    **HEAD,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
GPT: dict[str, Any] = {**COMMON, "n_embd": 128, "n_layer": 6, "n_head": 4, "n_positions": 512}
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
SHARED_EXPERT: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 64,
}

TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**LLAMA, "num_hidden_layers": 8}),
    "mistral": ("MistralConfig", {**LLAMA, "sliding_window": None}),
    "qwen2": ("Qwen2Config", LLAMA),
    "qwen3": ("Qwen3Config", HEAD),
    "gemma": ("GemmaConfig", HEAD),
    "gemma2": ("Gemma2Config", {**SLIDING, "query_pre_attn_scalar": 32}),
    "gemma3": ("Gemma3TextConfig", SLIDING),
    "phi": ("PhiConfig", LLAMA),
    "phi3": ("Phi3Config", LLAMA),
    "mixtral": ("MixtralConfig", {**LLAMA, "num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**LLAMA, **MOE, "shared_expert_intermediate_size": 64},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {**HEAD, **MOE}),
    "gpt_oss": (
        "GptOssConfig",
        {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt2": ("GPT2Config", GPT),
    "gptj": ("GPTJConfig", {**GPT, "rotary_dim": 16}),
    "opt": (
        "OPTConfig",
        {
            **COMMON,
            "hidden_size": 128,
            "word_embed_proj_dim": 128,
            "ffn_dim": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
        },
    ),
    "bloom": ("BloomConfig", {**COMMON, "hidden_size": 128, "n_layer": 6, "n_head": 4}),
    "falcon": (
        "FalconConfig",
        {
            **COMMON,
            "hidden_size": 128,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "new_decoder_architecture": False,
            "multi_query": True,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}),
    "stablelm": ("StableLmConfig", LLAMA),
    "olmo": ("OlmoConfig", LLAMA),
    "olmo2": ("Olmo2Config", LLAMA),
    "olmo3": ("Olmo3Config", {**SLIDING}),
    "olmoe": ("OlmoeConfig", {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2}),
    "cohere": ("CohereConfig", LLAMA),
    "granite": ("GraniteConfig", LLAMA),
    "granitemoe": ("GraniteMoeConfig", {**LLAMA, "num_local_experts": 4}),
    "starcoder2": ("Starcoder2Config", {**LLAMA, "sliding_window": None}),
    "nemotron": ("NemotronConfig", {**LLAMA, "head_dim": 32}),
    "exaone4": ("Exaone4Config", {**SLIDING, "sliding_window_pattern": 4}),
    "glm": ("GlmConfig", HEAD),
    "glm4": ("Glm4Config", HEAD),
    "smollm3": ("SmolLM3Config", {**LLAMA}),
    "arcee": ("ArceeConfig", LLAMA),
    "ernie4_5": ("Ernie4_5Config", HEAD),
    "seed_oss": ("SeedOssConfig", HEAD),
    "hunyuan_dense": ("HunYuanDenseV1Config", HEAD),
    "glm4_moe": ("Glm4MoeConfig", {**HEAD, **GLM_MOE}),
    "gpt_bigcode": ("GPTBigCodeConfig", GPT),
    "afmoe": (
        "AfmoeConfig",
        {
            **SLIDING,
            **MOE,
            "num_dense_layers": 1,
            # vLLM reads these, which Transformers' config has no names for.
            "score_func": "sigmoid",
            "route_norm": True,
            "route_scale": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "mup_enabled": False,
        },
    ),
    "apertus": ("ApertusConfig", HEAD),
    "cwm": ("CwmConfig", SLIDING),
    "exaone_moe": (
        "ExaoneMoeConfig",
        {
            **SLIDING,
            **MOE,
            "n_group": 1,
            "topk_group": 1,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "is_moe_layer": [False] + [True] * 5,
            "mlp_layer_types": ["dense"] + ["sparse"] * 5,
        },
    ),
    "flex_olmo": ("FlexOlmoConfig", {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2}),
    "gemma4": (
        "Gemma4TextConfig",
        {
            **SLIDING,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": VOCABULARY,
            "global_head_dim": 32,
        },
    ),
    # Attention layers alone: Mamba layers have no kernel on a CPU.
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            **LLAMA,
            **SHARED_EXPERT,
            "layer_types": ["attention"] * 6,
            "position_embedding_type": "rope",
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
        },
    ),
    "granitemoeshared": ("GraniteMoeSharedConfig", {**LLAMA, **SHARED_EXPERT}),
    "granite_swa": ("GraniteSWAConfig", SLIDING),
    "granitemoe_swa": ("GraniteMoeSWAConfig", {**SLIDING, **SHARED_EXPERT}),
    "hunyuan_moe": ("HunYuanMoEV1Config", {**HEAD, "num_experts": 4, "moe_topk": 2}),
    "hyperclovax": ("HyperCLOVAXConfig", HEAD),
    "jais2": ("Jais2Config", LLAMA),
    "llama4": (
        "Llama4TextConfig",
        {
            **HEAD,
            "intermediate_size_mlp": 256,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            # A multiple of vLLM's KV-cache block on a CPU.
            "attention_chunk_size": 128,
        },
    ),
    "mellum": ("MellumConfig", {**HEAD, **MOE}),
    "minicpm3": (
        "MiniCPM3Config",
        {
            **LLAMA,
            "num_key_value_heads": 4,
            "q_lora_rank": 64,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
        },
    ),
    "ministral3": ("Ministral3Config", HEAD),
    "vaultgemma": ("VaultGemmaConfig", {**SLIDING, "query_pre_attn_scalar": 32}),
}


def make_config(name: str, **changes: Any) -> Any:
    """The Transformers config of a tiny model."""
    import transformers

    kind, values = TINY[name]
    return getattr(transformers, kind)(**{**values, **changes})
