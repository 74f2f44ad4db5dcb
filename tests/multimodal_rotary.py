"""Tiny models with rotary positions by height and width, such as Qwen and GLM."""

from __future__ import annotations

from dataclasses import replace

from multimodal_towers import (
    DEEPSTACK,
    END,
    GLM_TOKENS,
    IMAGE,
    MOE,
    QWEN3_5_TEXT,
    QWEN3_VL_TEXT,
    QWEN_TOKENS,
    START,
    VIDEO,
    WINDOWED,
    minicpm,
    mrope,
    qwen_tower,
    tiny,
    tower,
)
from tiny import GLM_MOE, HEAD, LLAMA, SLIDING, Tiny

ROTARY: dict[str, Tiny] = {
    "qwen2_vl": tiny(
        "Qwen2VLConfig",
        text_config={**LLAMA, **mrope(4, 6, 6)},
        vision_config={
            "depth": 4,
            "embed_dim": 64,
            "hidden_size": 128,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 8,
        },
        **QWEN_TOKENS,
    ),
    "qwen2_5_vl": tiny(
        "Qwen2_5_VLConfig",
        text_config={**LLAMA, **mrope(4, 6, 6)},
        vision_config=WINDOWED,
        **QWEN_TOKENS,
    ),
    "qwen3_vl": tiny(
        "Qwen3VLConfig",
        text_config=QWEN3_VL_TEXT,
        vision_config=qwen_tower(6, **DEEPSTACK),
        **QWEN_TOKENS,
    ),
    "qwen3_vl_deepstack": tiny(
        "Qwen3VLConfig",
        text_config=QWEN3_VL_TEXT,
        vision_config=qwen_tower(6, **{**DEEPSTACK, "deepstack_visual_indexes": [0, 2]}),
        **QWEN_TOKENS,
    ),
    "qwen3_vl_moe": tiny(
        "Qwen3VLMoeConfig",
        text_config={
            **HEAD,
            **MOE,
            **mrope(6, 5, 5, mrope_interleaved=True),
            # Of the published config; Transformers has no such name and always does it.
            "norm_topk_prob": True,
            # Twice this is not the hidden size, so that a transposed matrix is known by its shape.
            "moe_intermediate_size": 96,
        },
        vision_config=qwen_tower(4, **DEEPSTACK),
        **QWEN_TOKENS,
    ),
    "qwen3_5": tiny(
        "Qwen3_5Config",
        text_config=QWEN3_5_TEXT,
        vision_config=qwen_tower(4, num_position_embeddings=64),
        **QWEN_TOKENS,
    ),
    "qwen3_5_moe": tiny(
        "Qwen3_5MoeConfig",
        text_config={**QWEN3_5_TEXT, **MOE, "shared_expert_intermediate_size": 64},
        vision_config=qwen_tower(4, num_position_embeddings=64),
        **QWEN_TOKENS,
    ),
    "qwen3_5_hybrid": replace(
        tiny(
            "Qwen3_5Config",
            text_config={
                **QWEN3_5_TEXT,
                "linear_key_head_dim": 128,
                "linear_value_head_dim": 128,
                "layer_types": ["linear_attention", "full_attention"] * 3,
            },
            vision_config=qwen_tower(4, num_position_embeddings=64),
            **QWEN_TOKENS,
        ),
        dtype="bfloat16",
    ),
    "glm4v": tiny(
        "Glm4vConfig",
        text_config={**HEAD, **mrope(2, 3, 3, partial_rotary_factor=0.5)},
        vision_config=qwen_tower(4, image_size=32),
        **GLM_TOKENS,
    ),
    "glm4v_moe": tiny(
        "Glm4vMoeConfig",
        text_config={
            **HEAD,
            **GLM_MOE,
            **mrope(2, 3, 3, partial_rotary_factor=0.5),
            # Of the published config, which vLLM reads and Transformers does not know.
            "use_qk_norm": False,
        },
        vision_config=qwen_tower(4, image_size=32),
        **GLM_TOKENS,
    ),
    "glm_ocr": tiny(
        "GlmOcrConfig",
        text_config={**HEAD, **mrope(4, 6, 6, partial_rotary_factor=1.0)},
        vision_config=qwen_tower(4, image_size=32),
        **GLM_TOKENS,
    ),
    "glm46v": tiny(
        "Glm46VConfig",
        text_config={
            **HEAD,
            **mrope(2, 3, 3, partial_rotary_factor=0.5),
            "model_type": "glm4v_text",
        },
        vision_config={**qwen_tower(4, image_size=32), "model_type": "glm4v_vision"},
        **GLM_TOKENS,
    ),
    "paddleocr_vl": tiny(
        "PaddleOCRVLConfig",
        text_config={**HEAD, **mrope(4, 6, 6)},
        vision_config=tower("paddleocr_vl_vision", 3),
        **QWEN_TOKENS,
    ),
    "hunyuan_vl": tiny(
        "HunYuanVLConfig",
        text_config={**HEAD, **mrope(4, 4, 4, 4)},
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 2,
            "num_hidden_layers": 4,
            "out_hidden_size": 128,
            "patch_size": 8,
            "max_image_size": 64,
            "min_image_size": 32,
            "max_vit_seq_len": 64,
            "img_max_token_num": 64,
            "text_hidden_size": 128,
        },
        image_token_id=IMAGE,
        im_start_id=START,
        im_end_id=END,
        im_newline_id=264,
    ),
    "exaone4_5": tiny(
        "Exaone4_5_Config",
        text_config={**SLIDING, "model_type": "exaone4"},
        vision_config={
            **WINDOWED,
            "num_key_value_heads": 1,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    ),
    "hyperclovax_vision": tiny(
        "HyperCLOVAXVisionV2Config",
        text_config={**HEAD, "model_type": "hyperclovax"},
        vision_config={
            **WINDOWED,
            "model_type": "qwen2_5_vl_vision",
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    ),
    "minicpmv4_6": minicpm("MiniCPMV4_6Config"),
    "minicpmv4_7": minicpm("MiniCPMV4_7Config"),
}
