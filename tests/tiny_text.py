"""More tiny models of text-generation architectures, for the equality matrix."""

from __future__ import annotations

from typing import Any

from tiny import HEAD, LLAMA, MOE, SLIDING, Tiny

# vLLM's CPU kernel turns heads by their own number, not their token's, where they come in three
# dimensions as here. The sizes are the one pair that its kernel of latent attention takes.
MLA: dict[str, Any] = {
    **LLAMA,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "q_lora_rank": 64,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
# What vLLM reads and Transformers takes for granted.
NOAUX: dict[str, Any] = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
# vLLM's window of these is one token wider than Transformers': here it takes all in.
WIDE: dict[str, Any] = {**SLIDING, "sliding_window": 64}

ENVIRONMENT = {"VLLM_MLA_DISABLE": "1"}
"""Latent attention has a CPU kernel in bfloat16 only; vLLM can do without, in any dtype."""

TINY: dict[str, Tiny] = {
    "deepseek_v2": Tiny("DeepseekV2Config", {**MLA, **ROUTED, "first_k_dense_replace": 1}),
    "deepseek_v3": Tiny("DeepseekV3Config", {**MLA, **ROUTED, **NOAUX, "first_k_dense_replace": 1}),
    "glm4_moe_lite": Tiny(
        "Glm4MoeLiteConfig", {**MLA, **ROUTED, **NOAUX, "first_k_dense_replace": 1}
    ),
    "axk1": Tiny("AXK1Config", {**MLA, **ROUTED, **NOAUX, "first_k_dense_replace": 0}),
    "cohere2": Tiny("Cohere2Config", {**WIDE, "logit_scale": 1.0}),
    "cohere2_moe": Tiny(
        "Cohere2MoeConfig",
        {
            **WIDE,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_layer_types": ["sparse"] * 6,
            "logit_scale": 1.0,
        },
    ),
    "ernie4_5_moe": Tiny(
        "Ernie4_5_MoeConfig",
        {
            **LLAMA,
            "moe_k": 2,
            "moe_num_experts": 4,
            "moe_num_shared_experts": 1,
            "moe_intermediate_size": 64,
        },
    ),
    "hy_v3": Tiny(
        "HYV3Config",
        {
            **HEAD,
            **MOE,
            "first_k_dense_replace": 1,
            "expert_hidden_dim": 64,
            "qk_norm": True,
            "route_norm": True,
        },
    ),
    "laguna": Tiny("LagunaConfig", {**SLIDING, **MOE, "shared_expert_intermediate_size": 64}),
    "minimax_m2": Tiny(
        "MiniMaxM2Config",
        {
            **HEAD,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rotary_dim": 16,
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
        },
    ),
    "mimo_v2_flash": Tiny(
        "MiMoV2FlashConfig",
        {
            **SLIDING,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "v_head_dim": 32,
            "swa_head_dim": 32,
            "swa_v_head_dim": 32,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "sliding_window_size": 16,
            "layernorm_epsilon": 1e-5,
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.5}
                for kind, theta in (("full_attention", 5e6), ("sliding_attention", 1e4))
            },
            "rope_theta": 5e6,
            "swa_rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "add_swa_attention_sink_bias": True,
            "hybrid_layer_pattern": [1, 0] * 3,
            "moe_layer_freq": [0] + [1] * 5,
        },
    ),
    "phimoe": Tiny(
        "PhimoeConfig",
        {
            **LLAMA,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            # vLLM makes both without being asked, and leaves empty what the checkpoint has not.
            "attention_bias": True,
            "lm_head_bias": True,
        },
        architecture="PhiMoEForCausalLM",
    ),
}

NOT_EQUAL: dict[str, str] = {
    "DbrxForCausalLM": "vLLM looks for its experts' weights by a name that they no longer have",
    "LongcatFlashForCausalLM": "its router has no CPU kernel (topk_softmax)",
}
