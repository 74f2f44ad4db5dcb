"""Tiny models with recurrent layers, alone or among attention layers, for the equality matrix."""

from __future__ import annotations

from typing import Any

from tiny import HEAD, LLAMA, MOE, SHARED_EXPERT, Tiny

# Removing {1, 3}, {0, 1, 3}, {1, 5} or {0, 5} leaves both kinds, in another pattern.
LINEAR = [
    "linear_attention",
    "full_attention",
    "linear_attention",
    "linear_attention",
    "full_attention",
    "linear_attention",
]
CONV = [kind.replace("linear_attention", "conv") for kind in LINEAR]
# vLLM's CPU kernel turns heads by their own number, not their token's, where they come in three
# dimensions as here.
ONE_HEAD: dict[str, Any] = {"num_attention_heads": 1, "num_key_value_heads": 1}
MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_d_state": 32,
    "mamba_chunk_size": 16,
}
DELTA: dict[str, Any] = {
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "layer_types": LINEAR,
}
JAMBA: dict[str, Any] = {
    **LLAMA,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "use_mamba_kernels": False,
}
STATES: dict[str, Any] = {k: LLAMA[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers")}
STATES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

TINY: dict[str, Tiny] = {
    "mamba": Tiny("MambaConfig", {**STATES, "state_size": 16}),
    "falcon_mamba": Tiny("FalconMambaConfig", {**STATES, "state_size": 16}),
    "mamba2": Tiny(
        "Mamba2Config",
        {
            **STATES,
            "num_heads": 8,
            "head_dim": 32,
            "state_size": 32,
            "n_groups": 1,
            "chunk_size": 16,
        },
    ),
    "falcon_h1": Tiny("FalconH1Config", {**HEAD, **MAMBA2, "mamba_d_ssm": 256}),
    "granitemoehybrid_mamba": Tiny(
        "GraniteMoeHybridConfig",
        {
            **LLAMA,
            **SHARED_EXPERT,
            **MAMBA2,
            "layer_types": LINEAR,
            "position_embedding_type": "rope",
        },
    ),
    "nemotron_h": Tiny(
        "NemotronHConfig",
        {
            **{k: v for k, v in HEAD.items() if k != "num_hidden_layers"},
            "layers_block_type": [
                "linear_attention",
                "full_attention",
                "mlp",
                "linear_attention",
                "mlp",
                "full_attention",
            ],
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "ssm_state_size": 32,
            "n_groups": 1,
            "chunk_size": 16,
        },
    ),
    "jamba": Tiny("JambaConfig", JAMBA),
    "zamba2": Tiny(
        "Zamba2Config",
        {
            **LLAMA,
            "num_key_value_heads": 4,
            "layers_block_type": [k.replace("full_attention", "hybrid") for k in LINEAR],
            "n_mamba_heads": 8,
            "mamba_d_state": 32,
            "chunk_size": 16,
            "adapter_rank": 16,
            "use_mem_rope": True,
            "use_mamba_kernels": False,
        },
    ),
    "lfm2": Tiny(
        "Lfm2Config",
        {
            **LLAMA,
            **ONE_HEAD,
            "layer_types": CONV,
            "block_auto_adjust_ff_dim": False,
            # Published configs have these, too; Transformers takes the hidden size.
            "block_dim": 128,
            "conv_dim": 128,
        },
    ),
    "lfm2_moe": Tiny(
        "Lfm2MoeConfig",
        {**LLAMA, **ONE_HEAD, **MOE, "layer_types": CONV, "num_dense_layers": 2},
    ),
    "qwen3_next": Tiny(
        "Qwen3NextConfig",
        {**HEAD, **MOE, **DELTA, "shared_expert_intermediate_size": 64},
        dtype="bfloat16",
    ),
    "qwen3_5": Tiny("Qwen3_5TextConfig", {**HEAD, **DELTA}, dtype="bfloat16"),
    "qwen3_5_moe": Tiny(
        "Qwen3_5MoeTextConfig",
        {**HEAD, **MOE, **DELTA, "shared_expert_intermediate_size": 64},
        dtype="bfloat16",
    ),
}

TORCHVISION = frozenset({"qwen3_5", "qwen3_5_moe"})
"""Whose modules vLLM cannot import without torchvision."""

NOT_EQUAL: dict[str, str] = {
    "KimiLinearForCausalLM": "its kernels are Triton's, which has none for a CPU",
    "OlmoHybridForCausalLM": "its kernels are Triton's, which has none for a CPU",
}
