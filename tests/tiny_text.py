"""More tiny models of text-generation architectures, for the equality matrix."""

from __future__ import annotations

from typing import Any

from tiny import HEAD, LLAMA, MOE, SLIDING, Tiny
from tiny import TINY as FIRST

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


def _named(architecture: str, config: str, values: dict[str, Any]) -> Tiny:
    return Tiny(config, values, architecture=architecture)


ENVIRONMENT = {"VLLM_MLA_DISABLE": "1"}
"""Latent attention has a CPU kernel in bfloat16 only; vLLM can do without, in any dtype."""

TINY: dict[str, Tiny] = {
    "deepseek_v2": Tiny("DeepseekV2Config", {**MLA, **ROUTED, "first_k_dense_replace": 1}),
    "deepseek_v3": Tiny("DeepseekV3Config", {**MLA, **ROUTED, **NOAUX, "first_k_dense_replace": 1}),
    "glm4_moe_lite": Tiny(
        "Glm4MoeLiteConfig",
        # Transformers' norms of the latent states always have this epsilon.
        {**MLA, **ROUTED, **NOAUX, "first_k_dense_replace": 1, "rms_norm_eps": 1e-6},
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
    "gemma3n": Tiny(
        "Gemma3nTextConfig",
        {
            **SLIDING,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": 512,
            "laurel_rank": 16,
            "activation_sparsity_pattern": [0.0] * 6,
        },
    ),
    # Of these, Transformers has the computation under another name only.
    "llama_of_decapoda": _named("LLaMAForCausalLM", "LlamaConfig", LLAMA),
    "internlm3": _named("InternLM3ForCausalLM", "LlamaConfig", LLAMA),
    "iquest_coder": _named("IQuestCoderForCausalLM", "LlamaConfig", LLAMA),
    "telechat3": _named("TeleChat3ForCausalLM", "LlamaConfig", LLAMA),
    "teleflm": _named("TeleFLMForCausalLM", "LlamaConfig", {**LLAMA, "use_mup": False}),
    "pangu_embedded": _named(
        "PanguEmbeddedForCausalLM", "LlamaConfig", {**LLAMA, "attention_bias": True}
    ),
    # Without its connections past layers, which are lists of layers' numbers.
    "solar": _named(
        "SolarForCausalLM",
        "LlamaConfig",
        {**LLAMA, **{f"bskcn_{i}": [] for i in (1, 2, 3, 4)}, "bskcn_tv": [0.9, 0.8]},
    ),
    "mimo": _named("MiMoForCausalLM", "Qwen2Config", {**LLAMA, "num_nextn_predict_layers": 0}),
    "orion": _named(
        "OrionForCausalLM",
        "StableLmConfig",
        {
            **LLAMA,
            "rms_norm_eps": 1e-5,
            "layer_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
            },
        },
    ),
    "minicpm": _named(
        "MiniCPMForCausalLM",
        "GraniteConfig",
        {
            **LLAMA,
            "scale_emb": 12.0,
            "embedding_multiplier": 12.0,
            "scale_depth": 4.0,
            # By the number of layers: another in a model that is cut.
            "residual_multiplier": 4.0 / 6**0.5,
            "dim_model_base": 64,
            "logits_scaling": 2.0,
            "attention_multiplier": 32**-0.5,
        },
    ),
    "exaone_moe_old": _named("ExaoneMoEForCausalLM", *FIRST["exaone_moe"]),
    # Those that vLLM knows no name of, and runs as Transformers does.
    "helium": Tiny("HeliumConfig", HEAD),
    "doge": Tiny("DogeConfig", LLAMA),
    "nanochat": Tiny("NanoChatConfig", LLAMA),
    "bitnet": Tiny("BitNetConfig", LLAMA),
    "solar_open": Tiny("SolarOpenConfig", {**HEAD, **ROUTED}),
    "dots1": Tiny(
        "Dots1Config",
        {
            **HEAD,
            **ROUTED,
            "first_k_dense_replace": 1,
            "layer_types": ["full_attention"] * 6,
        },
    ),
    "ministral": Tiny("MinistralConfig", SLIDING),
}

NOT_EQUAL: dict[str, str] = {
    "DbrxForCausalLM": "vLLM looks for its experts' weights by a name that they no longer have",
    "DiffLlamaForCausalLM": "its attention is not one that vLLM can run for Transformers",
    "AXK2ForCausalLM": "vLLM ends with an error as it runs it for Transformers",
    "BioGptForCausalLM": "vLLM ends with an error as it runs it for Transformers",
    "CodeGenForCausalLM": "vLLM knows no such model, and cannot run it for Transformers",
    "GPTNeoForCausalLM": "vLLM knows no such model, and cannot run it for Transformers",
    "XGLMForCausalLM": "vLLM knows no such model, and cannot run it for Transformers",
    "JetMoeForCausalLM": "differs by 1.5 as vLLM runs it for Transformers",
    "ModernBertDecoderForCausalLM": "vLLM finds no place for its head's weights",
    "YoutuForCausalLM": "differs by 1.3e-3 as vLLM runs it for Transformers",
    "PersimmonForCausalLM": "differs by 1.2 as vLLM runs it for Transformers",
    "Rnj1ForCausalLM": "its attention looks back by chunks, which vLLM's CPU kernel cannot",
    "LongcatFlashForCausalLM": "its router has no CPU kernel (topk_softmax)",
}
