"""Tiny multimodal models: six decoder blocks, and towers of another number where that is cheap."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from tiny import COMMON, HEAD, LLAMA, SLIDING, Tiny

AUTO = "AutoModelForMultimodalLM"

IMAGE, VIDEO, START, END, AUDIO = 300 + 180, 481, 482, 483, 484
"""Token numbers beyond the tokenizer's 259 letters, within the vocabulary."""

QWEN_TOKENS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
GLM_TOKENS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": 485,
    "video_end_token_id": 486,
}

LLAMA_TEXT = {**LLAMA, "model_type": "llama"}
MISTRAL_TEXT = {**HEAD, "model_type": "mistral", "sliding_window": None}
QWEN2_TEXT = {**LLAMA, "model_type": "qwen2"}
QWEN3_TEXT = {**HEAD, "model_type": "qwen3"}
GRANITE_TEXT = {**LLAMA, "model_type": "granite"}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def mrope(*sections: int, **more: Any) -> dict[str, Any]:
    """Rotary positions of three axes; the sections sum to half of what is rotated of a head."""
    return {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": list(sections),
            **more,
        }
    }


def tower(kind: str, layers: int, **more: Any) -> dict[str, Any]:
    """A vision tower's config, in the words of CLIP."""
    return {
        "model_type": kind,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        **more,
    }


def qwen_tower(layers: int, **more: Any) -> dict[str, Any]:
    """A vision tower's config, in the words of Qwen."""
    return {
        "depth": layers,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 128,
        **more,
    }


def audio_tower(kind: str, layers: int, **more: Any) -> dict[str, Any]:
    """An audio tower's config, in the words of Whisper."""
    return {
        "model_type": kind,
        "num_mel_bins": 16,
        "d_model": 64,
        "encoder_layers": layers,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 128,
        "max_source_positions": 64,
        **more,
    }


def speech_tower(kind: str, layers: int, **more: Any) -> dict[str, Any]:
    """An audio tower's config, in the words of most."""
    return {
        "model_type": kind,
        "num_mel_bins": 16,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_source_positions": 64,
        **more,
    }


DEEPSTACK = {"deepstack_visual_indexes": [0, 2], "num_position_embeddings": 64}
GLM_MOE = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    # Of the published config, which vLLM reads and Transformers does not know.
    "use_qk_norm": False,
}


def tiny(config: str, auto: str = AUTO, **values: Any) -> Tiny:
    return Tiny(config, values, auto, engine={"language_model_only": True})


TINY: dict[str, Tiny] = {
    "llava": tiny(
        "LlavaConfig",
        text_config=LLAMA_TEXT,
        vision_config=tower("clip_vision_model", 4),
        image_token_index=IMAGE,
    ),
    "llava_next": tiny(
        "LlavaNextConfig",
        text_config=MISTRAL_TEXT,
        # As many layers as the decoder has: who looks for "a list of six" finds this one first.
        vision_config=tower("clip_vision_model", 6),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[32, 64], [64, 32]],
    ),
    "llava_next_video": tiny(
        "LlavaNextVideoConfig",
        text_config=LLAMA_TEXT,
        vision_config=tower("clip_vision_model", 3),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[32, 64], [64, 32]],
    ),
    "llava_onevision": tiny(
        "LlavaOnevisionConfig",
        text_config=QWEN2_TEXT,
        vision_config=tower("siglip_vision_model", 3),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[32, 64], [64, 32]],
    ),
    "gemma3": tiny(
        "Gemma3Config",
        text_config={**SLIDING, "query_pre_attn_scalar": 32},
        vision_config=tower("siglip_vision_model", 3),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    ),
    "mistral3": tiny(
        "Mistral3Config",
        text_config=MISTRAL_TEXT,
        vision_config=tower("pixtral", 3),
        image_token_index=IMAGE,
    ),
    "paligemma": tiny(
        "PaliGemmaConfig",
        text_config={**HEAD, "model_type": "gemma"},
        vision_config=tower("siglip_vision_model", 3),
        image_token_index=IMAGE,
        projection_dim=128,
        hidden_size=128,
        vocab_size=512,
    ),
    "idefics3": tiny(
        "Idefics3Config",
        text_config=LLAMA_TEXT,
        vision_config=tower("idefics3_vision", 3),
        image_token_id=IMAGE,
        pad_token_id=0,
    ),
    "smolvlm": tiny(
        "SmolVLMConfig",
        text_config=LLAMA_TEXT,
        vision_config=tower("smolvlm_vision", 4),
        image_token_id=IMAGE,
        pad_token_id=0,
    ),
    "internvl": tiny(
        "InternVLConfig",
        text_config=QWEN2_TEXT,
        vision_config=tower("internvl_vision", 4, image_size=[32, 32], patch_size=[8, 8]),
        image_token_id=IMAGE,
        image_seq_length=4,
    ),
    "qianfan_ocr": tiny(
        "QianfanOCRConfig",
        text_config=QWEN3_TEXT,
        vision_config=tower("qianfan_ocr_vision", 4),
        image_token_id=IMAGE,
        image_seq_length=4,
    ),
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
        vision_config=qwen_tower(4, window_size=32, fullatt_block_indexes=[1, 3]),
        **QWEN_TOKENS,
    ),
    "qwen3_vl": tiny(
        "Qwen3VLConfig",
        text_config={**HEAD, **mrope(6, 5, 5, mrope_interleaved=True)},
        vision_config=qwen_tower(6, **DEEPSTACK),
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
        },
        vision_config=qwen_tower(4, **DEEPSTACK),
        **QWEN_TOKENS,
    ),
    "qwen3_5": tiny(
        "Qwen3_5Config",
        text_config={
            **HEAD,
            **mrope(2, 1, 1, mrope_interleaved=True, partial_rotary_factor=0.25),
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            # vLLM's linear attention on a CPU computes in bfloat16 alone.
            "layer_types": ["full_attention"] * 6,
        },
        vision_config=qwen_tower(4, num_position_embeddings=64),
        **QWEN_TOKENS,
    ),
    "qwen3_5_moe": tiny(
        "Qwen3_5MoeConfig",
        text_config={
            **HEAD,
            **MOE,
            **mrope(2, 1, 1, mrope_interleaved=True, partial_rotary_factor=0.25),
            "shared_expert_intermediate_size": 64,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            # vLLM's linear attention on a CPU computes in bfloat16 alone.
            "layer_types": ["full_attention"] * 6,
        },
        vision_config=qwen_tower(4, num_position_embeddings=64),
        **QWEN_TOKENS,
    ),
    "glm4v": tiny(
        "Glm4vConfig",
        text_config={**HEAD, **mrope(2, 3, 3, partial_rotary_factor=0.5)},
        vision_config=qwen_tower(4, image_size=32),
        **GLM_TOKENS,
    ),
    "glm4v_moe": tiny(
        "Glm4vMoeConfig",
        text_config={**HEAD, **GLM_MOE, **mrope(2, 3, 3, partial_rotary_factor=0.5)},
        vision_config=qwen_tower(4, image_size=32),
        **GLM_TOKENS,
    ),
    "glm_ocr": tiny(
        "GlmOcrConfig",
        text_config={**HEAD, **mrope(4, 6, 6, partial_rotary_factor=1.0)},
        vision_config=qwen_tower(4, image_size=32),
        **GLM_TOKENS,
    ),
    "gemma4": tiny(
        "Gemma4Config",
        text_config={
            **SLIDING,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 512,
            "global_head_dim": 32,
        },
        vision_config=tower("gemma4_vision", 3, num_key_value_heads=2, head_dim=32),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        boi_token_id=START,
        eoi_token_id=END,
    ),
    "aria": tiny(
        "AriaConfig",
        text_config={
            **HEAD,
            "model_type": "aria_text",
            "moe_num_experts": 4,
            "moe_topk": 2,
            "moe_num_shared_experts": 1,
        },
        vision_config=tower("idefics3_vision", 3),
        image_token_index=IMAGE,
        projector_patch_to_query_dict={16: 4},
    ),
    "cohere2_vision": tiny(
        "Cohere2VisionConfig",
        text_config={**SLIDING, "model_type": "cohere2"},
        vision_config=tower("siglip_vision_model", 3),
        image_token_id=IMAGE,
        alignment_intermediate_size=128,
    ),
    "llama4": tiny(
        "Llama4Config",
        text_config={
            **HEAD,
            "intermediate_size_mlp": 256,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 128,
        },
        vision_config={
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 256,
            "vision_output_dim": 128,
            "image_size": 32,
            "patch_size": 8,
            "projector_input_dim": 128,
            "projector_output_dim": 128,
        },
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    ),
    "ernie4_5_vl_moe": tiny(
        "Ernie4_5_VLMoeConfig",
        text_config={
            **LLAMA,
            "moe_intermediate_size": [64, 32],
            "moe_k": 2,
            "moe_num_experts": 4,
            "moe_num_shared_experts": 1,
            "mlp_layer_types": ["dense"] + ["sparse"] * 5,
            **mrope(6, 6, 4),
        },
        vision_config={
            "depth": 4,
            "hidden_size": 64,
            # vLLM reads this name of the published config.
            "embed_dim": 64,
            "num_heads": 2,
            "patch_size": 8,
            "intermediate_size": 128,
        },
        image_token_id=IMAGE,
        image_start_token_id=START,
        image_end_token_id=END,
        video_token_id=VIDEO,
        video_start_token_id=485,
        video_end_token_id=486,
    ),
    "paddleocr_vl": tiny(
        "PaddleOCRVLConfig",
        text_config={**HEAD, **mrope(4, 6, 6)},
        vision_config=tower("paddleocr_vl_vision", 3),
        **QWEN_TOKENS,
    ),
    "lfm2_vl": tiny(
        "Lfm2VlConfig",
        text_config={
            **LLAMA,
            "model_type": "lfm2",
            "conv_dim": 128,
            "block_auto_adjust_ff_dim": False,
            "layer_types": ["conv", "full_attention"] * 3,
        },
        vision_config=tower("siglip2_vision_model", 3, num_patches=16),
        image_token_id=IMAGE,
        projector_hidden_size=128,
    ),
    "qwen2_audio": tiny(
        "Qwen2AudioConfig",
        text_config=QWEN2_TEXT,
        audio_config=audio_tower("qwen2_audio_encoder", 3),
        audio_token_index=AUDIO,
    ),
    "voxtral": tiny(
        "VoxtralConfig",
        text_config=LLAMA_TEXT,
        audio_config=speech_tower("voxtral_encoder", 3, downsample_factor=4),
        audio_token_id=AUDIO,
    ),
    "audioflamingo3": tiny(
        "AudioFlamingo3Config",
        "AutoModelForSeq2SeqLM",
        text_config=QWEN2_TEXT,
        audio_config=speech_tower("audioflamingo3_encoder", 3),
        audio_token_id=AUDIO,
    ),
    "glmasr": tiny(
        "GlmAsrConfig",
        text_config=LLAMA_TEXT,
        audio_config=speech_tower("glmasr_encoder", 3, max_position_embeddings=64),
        audio_token_id=AUDIO,
    ),
    "cohere_compass": tiny(
        "CohereCompassConfig",
        text_config={
            **SLIDING,
            "rope_parameters": {
                "sliding_attention": mrope(6, 5, 5)["rope_parameters"],
                "full_attention": None,
            },
        },
        vision_config=qwen_tower(4, **DEEPSTACK),
        **QWEN_TOKENS,
    ),
    "cosmos3_edge": tiny(
        "Cosmos3EdgeConfig",
        text_config={**HEAD, **mrope(6, 5, 5)},
        vision_config=tower("cosmos3_edge_vision", 3, num_patches=16),
        projector_hidden_size=128,
        **QWEN_TOKENS,
    ),
    "exaone4_5": tiny(
        "Exaone4_5_Config",
        text_config={**SLIDING, "model_type": "exaone4"},
        vision_config={
            **qwen_tower(4, window_size=32, fullatt_block_indexes=[1, 3]),
            "num_key_value_heads": 1,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    ),
    "gemma3n": tiny(
        "Gemma3nConfig",
        text_config={
            **SLIDING,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": 512,
            "num_kv_shared_layers": 2,
            "laurel_rank": 16,
            "activation_sparsity_pattern": [0.95] * 2 + [0.0] * 4,
        },
        audio_config={
            "hidden_size": 64,
            "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 2,
            "vocab_offset": 490,
            "vocab_size": 8,
        },
        vision_config={"hidden_size": 64, "vocab_offset": 500, "vocab_size": 8},
        image_token_id=IMAGE,
        audio_token_id=AUDIO,
        boi_token_id=START,
        eoi_token_id=END,
        boa_token_id=485,
        eoa_token_id=486,
    ),
    "gemma4_unified": tiny(
        "Gemma4UnifiedConfig",
        text_config={
            **SLIDING,
            "num_kv_shared_layers": 0,
            "global_head_dim": 32,
        },
        vision_config={"patch_size": 8, "mm_embed_dim": 64, "output_proj_dims": 64},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        boi_token_id=START,
        eoi_token_id=END,
    ),
    "granite4_vision": tiny(
        "Granite4VisionConfig",
        text_config={**GRANITE_TEXT, "model_type": "granite4_vision_text"},
        vision_config=tower("siglip_vision_model", 4),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[32, 64], [64, 32]],
        downsample_rate="1/2",
        deepstack_layer_map=[[-2, 0], [-1, 2]],
        spatial_target_layers=[1, 2, 3, 4],
        image_seq_length=16,
    ),
    "granite_speech": tiny(
        "GraniteSpeechConfig",
        text_config=GRANITE_TEXT,
        encoder_config={
            "input_dim": 32,
            "num_layers": 2,
            "hidden_dim": 64,
            "num_heads": 2,
            "output_dim": 16,
            "context_size": 16,
            "max_pos_emb": 32,
        },
        projector_config={
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "encoder_hidden_size": 64,
        },
        audio_token_index=AUDIO,
        has_lora_adapter=False,
    ),
    "granite_speech_plus": tiny(
        "GraniteSpeechPlusConfig",
        text_config=GRANITE_TEXT,
        encoder_config={
            "input_dim": 32,
            "num_layers": 6,
            "hidden_dim": 64,
            "num_heads": 2,
            "output_dim": 16,
            "context_size": 16,
            "max_pos_emb": 32,
        },
        projector_config={
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "encoder_hidden_size": 64,
        },
        audio_token_index=AUDIO,
        has_lora_adapter=False,
    ),
    "minicpmv4_6": tiny(
        "MiniCPMV4_6Config",
        text_config=QWEN3_TEXT,
        vision_config={**tower("", 4), "insert_layer_id": 2},
        insert_layer_id=2,
        image_size=32,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    ),
    "minicpmv4_7": tiny(
        "MiniCPMV4_7Config",
        text_config=QWEN3_TEXT,
        vision_config={**tower("", 4), "insert_layer_id": 2},
        insert_layer_id=2,
        image_size=32,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    ),
    "muse_glimmer": tiny(
        "MuseGlimmerConfig",
        text_config={**HEAD, "sliding_window": 16},
        vision_config={
            "patch_size": 8,
            "pos_emb_height": 8,
            "pos_emb_width": 8,
            "num_attention_heads": 2,
            "num_hidden_layers": 4,
            "hidden_size": 64,
            "intermediate_size": 128,
            "max_position_embeddings": 64,
        },
        out_hidden_size=256,
        projector_hidden_size=128,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    ),
    "qwen3_asr": tiny(
        "Qwen3ASRConfig",
        text_config=QWEN3_TEXT,
        audio_config=audio_tower(
            "qwen3_asr_encoder", 3, output_dim=128, downsample_hidden_size=16
        ),
        audio_token_id=AUDIO,
        timestamp_token_id=485,
        pad_token_id=0,
        eos_token_id=2,
    ),
    "step3p7": tiny(
        "Step3p7Config",
        text_config={
            **HEAD,
            "sliding_window": 16,
            "layer_types": ["full_attention", "sliding_attention"] * 3,
            "num_sliding_attention_heads": 6,
            "moe_intermediate_size": 64,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "share_expert_dim": 64,
        },
        vision_config={
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "mlp_ratio": 2.0,
            "max_position_embeddings": 16,
        },
        image_token_id=IMAGE,
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
        im_newline_id=485,
    ),
    "emu3": tiny(
        "Emu3Config",
        text_config=LLAMA,
        vq_config={
            "codebook_size": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "hidden_size": 64,
            "num_res_blocks": 1,
            "attn_resolutions": [],
        },
        vocabulary_map={"<image>": IMAGE},
    ),
    "minimax_m3": tiny(
        "MiniMaxM3VLConfig",
        text_config={
            **HEAD,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_layer_types": ["dense"] + ["sparse"] * 5,
        },
        vision_config=tower("", 4),
        projector_hidden_size=128,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    ),
    "aya_vision": tiny(
        "AyaVisionConfig",
        text_config={**SLIDING, "model_type": "cohere2"},
        vision_config=tower("siglip_vision_model", 3),
        image_token_index=IMAGE,
    ),
    "video_llava": tiny(
        "VideoLlavaConfig",
        text_config=LLAMA_TEXT,
        vision_config=tower("clip_vision_model", 3),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    ),
    "vipllava": tiny(
        "VipLlavaConfig",
        text_config=LLAMA_TEXT,
        vision_config=tower("clip_vision_model", 6),
        vision_feature_layers=[-2, -3, 1],
        image_token_index=IMAGE,
    ),
    "ovis2": tiny(
        "Ovis2Config",
        text_config=QWEN2_TEXT,
        vision_config={**tower("", 3), "vocab_size": 32},
        image_token_id=IMAGE,
        visual_indicator_token_ids=[485, 486, 487, 488, 489],
        vocab_size=512,
        hidden_size=128,
    ),
    "got_ocr2": tiny(
        "GotOcr2Config",
        text_config=QWEN2_TEXT,
        vision_config={
            **tower("", 4),
            "output_channels": 16,
            "mlp_dim": 128,
            "window_size": 2,
            "global_attn_indexes": [1, 3],
        },
        image_token_index=IMAGE,
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
    "lighton_ocr": tiny(
        "LightOnOcrConfig",
        text_config=QWEN3_TEXT,
        vision_config=tower("pixtral", 3),
        image_token_id=IMAGE,
    ),
    "deepseek_vl": tiny(
        "DeepseekVLConfig",
        text_config=LLAMA_TEXT,
        vision_config=tower("siglip_vision_model", 3),
        image_token_id=IMAGE,
    ),
    "idefics2": tiny(
        "Idefics2Config",
        text_config=MISTRAL_TEXT,
        vision_config=tower("", 3),
        perceiver_config={
            "hidden_size": 128,
            "resampler_n_latents": 4,
            "resampler_depth": 2,
            "resampler_n_heads": 2,
            "resampler_head_dim": 32,
            "num_key_value_heads": 2,
        },
        image_token_id=IMAGE,
    ),
    "video_llama3": tiny(
        "VideoLlama3Config",
        text_config=QWEN2_TEXT,
        vision_config=tower("", 3),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    ),
    "hyperclovax_vision": tiny(
        "HyperCLOVAXVisionV2Config",
        text_config={**HEAD, "model_type": "hyperclovax"},
        vision_config={
            **qwen_tower(4, window_size=32, fullatt_block_indexes=[1, 3]),
            "model_type": "qwen2_5_vl_vision",
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    ),
    "janus": tiny(
        "JanusConfig",
        text_config=LLAMA_TEXT,
        vision_config={**tower("janus_vision_model", 3), "projection_dim": 128},
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 16,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "num_patches": 4,
            "projection_dim": 128,
            "image_token_embed_dim": 128,
        },
        image_token_id=IMAGE,
    ),
    "fuyu": tiny(
        "FuyuConfig",
        **{
            key: value
            for key, value in {**LLAMA, "num_key_value_heads": None}.items()
            if value is not None
        },
        text_config={
            **LLAMA,
            "model_type": "persimmon",
            "partial_rotary_factor": 0.5,
            "qk_layernorm": True,
        },
        image_token_id=IMAGE,
    ),
    "musicflamingo": tiny(
        "MusicFlamingoConfig",
        "AutoModelForSeq2SeqLM",
        text_config=QWEN2_TEXT,
        audio_config=speech_tower("audioflamingo3_encoder", 3),
        audio_token_id=AUDIO,
        audio_bos_token_id=485,
        audio_eos_token_id=486,
    ),
    "fun_asr_nano": tiny(
        "FunAsrNanoConfig",
        text_config=QWEN3_TEXT,
        adaptor_config={
            "hidden_size": 128,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "projector_hidden_size": 64,
        },
        audio_token_id=AUDIO,
    ),
    "qwen2_5_omni": tiny(
        "Qwen2_5OmniConfig",
        thinker_config={
            "text_config": {**LLAMA, "tie_word_embeddings": False, **mrope(4, 6, 6)},
            "vision_config": qwen_tower(4, window_size=32, fullatt_block_indexes=[1, 3]),
            "audio_config": audio_tower("", 3, output_dim=128),
            "audio_token_index": AUDIO,
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "audio_start_token_id": 485,
            "audio_end_token_id": 486,
            "user_token_id": 487,
        },
        enable_audio_output=False,
    ),
    "qwen3_omni_moe": tiny(
        "Qwen3OmniMoeConfig",
        thinker_config={
            "text_config": {**HEAD, **MOE, **mrope(6, 5, 5, mrope_interleaved=True)},
            "vision_config": qwen_tower(4, **DEEPSTACK),
            "audio_config": audio_tower("", 3, output_dim=128, downsample_hidden_size=16),
            "audio_token_id": AUDIO,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "audio_start_token_id": 485,
            "user_token_id": 487,
        },
        enable_audio_output=False,
    ),
}


def make_config(name: str) -> Any:
    """The Transformers config of a tiny multimodal model."""
    import transformers

    tiny = TINY[name]
    # Configs take nested dicts over as they are, and change them.
    return getattr(transformers, tiny.config)(**copy.deepcopy(tiny.values))


def save(name: str, folder: Path) -> None:
    """A tiny random multimodal model by its name in `TINY`."""
    import torch
    import transformers

    from conftest import tokenizer

    torch.manual_seed(sum(map(ord, name)))
    model = getattr(transformers, TINY[name].auto).from_config(make_config(name)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    _rename(folder, {"language_model.model.model.": "language_model.model."})
    tokenizer().save_pretrained(folder)


def _rename(folder: Path, prefixes: dict[str, str]) -> None:
    """Put other prefixes before a checkpoint's tensors."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    renamed = {}
    for name, tensor in tensors.items():
        old = next((old for old in prefixes if name.startswith(old)), "")
        renamed[prefixes.get(old, "") + name.removeprefix(old)] = tensor
    if renamed.keys() != tensors.keys():
        save_file(renamed, file, metadata={"format": "pt"})
