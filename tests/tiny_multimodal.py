"""Tiny multimodal models: six decoder blocks, and towers of another number where that is cheap."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tiny import GLM_MOE, HEAD, LLAMA, SLIDING, Tiny

AUTO = "AutoModelForMultimodalLM"

IMAGE, VIDEO, START, END, AUDIO = range(259, 264)
"""Token numbers: `SPECIAL` are put behind the tokenizer's 259."""
SPECIAL = (
    *("<image>", "<video>", "<start>", "<end>", "<audio>"),
    # What processors of Idefics 3, LightOn and Pixtral look for.
    *("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<break>"),
)

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
    "video_start_token_id": 264,
    "video_end_token_id": 265,
}

LLAMA_TEXT = {**LLAMA, "model_type": "llama"}
MISTRAL_TEXT = {**HEAD, "model_type": "mistral", "sliding_window": None}
QWEN2_TEXT = {**LLAMA, "model_type": "qwen2"}
QWEN3_TEXT = {**HEAD, "model_type": "qwen3"}
GRANITE_TEXT = {**LLAMA, "model_type": "granite"}
# Transformers' models with a tower do not scale logits, vLLM's do.
# And vLLM's window is one token wider; none here reaches it.
COHERE2_TEXT = {**SLIDING, "model_type": "cohere2", "logit_scale": 1.0, "sliding_window": 64}
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


PINPOINTS = [[32, 64], [64, 32]]
WINDOWED = qwen_tower(4, window_size=32, fullatt_block_indexes=[1, 3])
"""The tower of Qwen 2.5, which others took over."""
QWEN3_VL_TEXT = {**HEAD, **mrope(6, 5, 5, mrope_interleaved=True)}
QWEN3_5_TEXT = {
    **HEAD,
    **mrope(2, 1, 1, mrope_interleaved=True, partial_rotary_factor=0.25),
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    # vLLM's linear attention on a CPU computes in bfloat16 alone.
    "layer_types": ["full_attention"] * 6,
}
# A tower that feeds none of the decoder's first layers: those could not be removed.
DEEPSTACK = {"deepstack_visual_indexes": [], "num_position_embeddings": 64}


def tiny(config: str, auto: str = AUTO, **values: Any) -> Tiny:
    return Tiny(config, values, auto, engine={"language_model_only": True})


def granite_speech(config: str, layers: int) -> Tiny:
    """A model of Granite with an encoder of so many layers for speech."""
    return tiny(
        config,
        text_config=GRANITE_TEXT,
        encoder_config={
            "input_dim": 32,
            "num_layers": layers,
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
    )


def minicpm(config: str) -> Tiny:
    """A MiniCPM-V on Qwen 3.5."""
    return tiny(
        config,
        text_config={**QWEN3_5_TEXT, "model_type": "qwen3_5_text"},
        vision_config={**tower("", 4), "insert_layer_id": 2},
        insert_layer_id=2,
        image_size=32,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


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
        image_grid_pinpoints=PINPOINTS,
    ),
    "llava_next_video": tiny(
        "LlavaNextVideoConfig",
        text_config=LLAMA_TEXT,
        vision_config=tower("clip_vision_model", 3),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
    ),
    "llava_onevision": tiny(
        "LlavaOnevisionConfig",
        text_config=QWEN2_TEXT,
        vision_config=tower("siglip_vision_model", 3),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
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
        text_config={
            **HEAD,
            "model_type": "gemma",
            # Else a prompt without an image is one prefix that sees itself whole; not so in vLLM.
            "use_bidirectional_attention": False,
        },
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
        text_config=COHERE2_TEXT,
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
    "paddleocr_vl": tiny(
        "PaddleOCRVLConfig",
        text_config={**HEAD, **mrope(4, 6, 6)},
        vision_config=tower("paddleocr_vl_vision", 3),
        **QWEN_TOKENS,
    ),
    "qwen2_audio": tiny(
        "Qwen2AudioConfig",
        text_config=QWEN2_TEXT,
        audio_config=audio_tower("qwen2_audio_encoder", 3),
        audio_token_index=AUDIO,
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
    "gemma4_unified": tiny(
        "Gemma4UnifiedConfig",
        text_config={
            **SLIDING,
            "num_kv_shared_layers": 0,
            "global_head_dim": 32,
        },
        vision_config={"patch_size": 8, "mm_embed_dim": 64, "output_proj_dims": 64},
        image_token_id=IMAGE,
        # One that the random model does not say by itself.
        video_token_id=511,
        audio_token_id=AUDIO,
        boi_token_id=START,
        eoi_token_id=END,
    ),
    "granite4_vision": tiny(
        "Granite4VisionConfig",
        text_config={**GRANITE_TEXT, "model_type": "granite4_vision_text"},
        vision_config=tower("siglip_vision_model", 4),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        downsample_rate="1/2",
        # Layers that are fed cannot go: those that no set of the matrix removes.
        deepstack_layer_map=[[-2, 2]],
        spatial_target_layers=[4],
        image_seq_length=16,
    ),
    "granite_speech": granite_speech("GraniteSpeechConfig", 2),
    "granite_speech_plus": granite_speech("GraniteSpeechPlusConfig", 6),
    "minicpmv4_6": minicpm("MiniCPMV4_6Config"),
    "minicpmv4_7": minicpm("MiniCPMV4_7Config"),
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
            # vLLM's names for the two below.
            "output_dim": 256,
            "adapter_dim": 128,
        },
        out_hidden_size=256,
        projector_hidden_size=128,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    ),
    "qwen3_asr": tiny(
        "Qwen3ASRConfig",
        text_config=QWEN3_TEXT,
        audio_config=audio_tower("qwen3_asr_encoder", 3, output_dim=128, downsample_hidden_size=16),
        audio_token_id=AUDIO,
        timestamp_token_id=264,
        pad_token_id=0,
        eos_token_id=2,
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
    "aya_vision": tiny(
        "AyaVisionConfig",
        text_config=COHERE2_TEXT,
        vision_config=tower("siglip_vision_model", 3),
        image_token_index=IMAGE,
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
        visual_indicator_token_ids=[264, 265, 266, 267, 268],
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
            **WINDOWED,
            "model_type": "qwen2_5_vl_vision",
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    ),
    "qwen2_5_omni": tiny(
        "Qwen2_5OmniConfig",
        thinker_config={
            "text_config": {**LLAMA, "tie_word_embeddings": False, **mrope(4, 6, 6)},
            "vision_config": WINDOWED,
            "audio_config": audio_tower("", 3, output_dim=128),
            "audio_token_index": AUDIO,
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "audio_start_token_id": 264,
            "audio_end_token_id": 265,
            "user_token_id": 266,
        },
        enable_audio_output=False,
    ),
    "qwen3_omni_moe": tiny(
        "Qwen3OmniMoeConfig",
        thinker_config={
            "text_config": {
                "tie_word_embeddings": False,
                **HEAD,
                **MOE,
                **mrope(6, 5, 5, mrope_interleaved=True),
            },
            "vision_config": qwen_tower(
                4, image_size=32, apply_vit_abs_pos_embed=True, **DEEPSTACK
            ),
            "audio_config": audio_tower("", 3, output_dim=128, downsample_hidden_size=16),
            "audio_token_id": AUDIO,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "audio_start_token_id": 264,
            "user_token_id": 266,
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

    torch.manual_seed(sum(map(ord, name)))
    model = getattr(transformers, TINY[name].auto).from_config(make_config(name)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5 / parameter.shape[-1] ** 0.5)
    model.to(getattr(torch, TINY[name].dtype)).save_pretrained(folder)
    if name in AS_PUBLISHED:
        AS_PUBLISHED[name](folder)
    tokenizer = multimodal_tokenizer()
    tokenizer.save_pretrained(folder)
    if name in PROCESSORS:
        with suppress(ImportError):  # some processors want torchvision, which text alone does not
            PROCESSORS[name](tokenizer).save_pretrained(folder)


def multimodal_tokenizer() -> Any:
    """The tests' tokenizer with tokens for images, under the names that processors know."""
    from transformers import PreTrainedTokenizerFast

    from conftest import tokenizer

    letters = tokenizer()
    letters.add_tokens(list(SPECIAL), special_tokens=True)
    image, video, start, end, audio = SPECIAL[:5]
    return PreTrainedTokenizerFast(
        tokenizer_object=letters.backend_tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=letters.chat_template,
        extra_special_tokens={
            "image_token": image,
            "video_token": video,
            "audio_token": audio,
            "boi_token": start,
            "eoi_token": end,
            "start_image_token": start,
            "end_image_token": end,
            "context_image_token": image,
            "vision_start_token": start,
            "vision_end_token": end,
            "image_start_token": start,
            "image_end_token": end,
            "image_newline_token": "<break>",
            "image_break_token": "<break>",
            "image_wrapper_token": "<fake_token_around_image>",
            "image_boundary_token": "<fake_token_around_image>",
            "fake_image_token": "<fake_token_around_image>",
            "eof_token": "<break>",
            "eol_token": "<break>",
        },
    )


def _change_tensors(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def _change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config, indent=1))


def _rename(folder: Path, prefixes: dict[str, str]) -> None:
    """Put other prefixes before a checkpoint's tensors."""

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        renamed = {}
        for name, tensor in tensors.items():
            old = next((old for old in prefixes if name.startswith(old)), "")
            renamed[prefixes.get(old, "") + name.removeprefix(old)] = tensor
        return renamed

    _change_tensors(folder, change)


def _one_model_less(folder: Path) -> None:
    """What `save_pretrained` calls language_model.model.model, hub and vLLM call by two names."""
    _rename(folder, {"language_model.model.model.": "language_model.model."})


def _transposed_experts(folder: Path) -> None:
    """Experts' matrices are published transposed; a model made anew is not saved so."""
    _change_tensors(
        folder,
        lambda tensors: {
            name: tensor.transpose(1, 2).contiguous() if ".mlp.experts." in name else tensor
            for name, tensor in tensors.items()
        },
    )


def _two_names_of_the_tower(folder: Path) -> None:
    """CLIP and SigLIP towers had one more name, which vLLM asks for."""
    _rename(folder, {"vision_tower.": "vision_tower.vision_model."})


def _qianfan(folder: Path) -> None:
    _rename(folder, {"language_model.model.encoder.layers.": "language_model.model.layers."})
    _change_config(folder, lambda c: c["vision_config"].update(image_size=32, patch_size=8))


AS_PUBLISHED: dict[str, Callable[[Path], None]] = {
    "audioflamingo3": _one_model_less,
    "gemma3": _two_names_of_the_tower,
    "glmasr": _one_model_less,
    "granite_speech": _one_model_less,
    "granite_speech_plus": _one_model_less,
    "llava": _two_names_of_the_tower,
    "llava_next": _two_names_of_the_tower,
    "llava_next_video": _two_names_of_the_tower,
    "llava_onevision": _two_names_of_the_tower,
    "paligemma": _two_names_of_the_tower,
    "qianfan_ocr": _qianfan,
    "qwen2_audio": _one_model_less,
    "qwen3_vl_moe": _transposed_experts,
}
"""Where what `save_pretrained` writes today is not what vLLM and the hub know."""


def published(name: str, folder: Path) -> None:
    """A model of `PUBLISHED` with the config that its family has on the hub."""
    save(name, folder)
    _change_config(folder, PUBLISHED[name])


def _flat(config: dict[str, Any]) -> None:
    """The text model's sizes at the top, beside vision_config, and rotary positions as of old."""
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    # Of the text model alone, or derived from the rest.
    for key in ("architectures", "dtype", "layer_types", "model_type", "tie_word_embeddings"):
        text.pop(key, None)
    config |= text
    config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}


def _sliding_pattern(config: dict[str, Any]) -> None:
    """Which layers slide as one number, and the two kinds' rotary bases as two."""
    text = config["text_config"]
    del text["layer_types"]
    rope = text.pop("rope_parameters")
    text["sliding_window_pattern"] = 2
    text["rope_theta"] = rope["full_attention"]["rope_theta"]
    text["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]


PUBLISHED: dict[str, Callable[[dict[str, Any]], None]] = {
    "gemma3": _sliding_pattern,
    "qwen2_5_vl": _flat,
    "qwen2_vl": _flat,
}
"""Where the config on the hub is of another form than what `save_pretrained` writes today."""

SQUARE = {"height": 32, "width": 32}
QWEN_IMAGES: dict[str, Any] = {
    "patch_size": 8,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "size": {"shortest_edge": 16 * 16, "longest_edge": 48 * 48},
}


def _llava_processor(tokenizer: Any) -> Any:
    import transformers

    return transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _qwen_processor(
    kind: str, images: str = "Qwen2VLImageProcessor", videos: str = "Qwen2VLVideoProcessor"
) -> Callable[[Any], Any]:
    def make(tokenizer: Any) -> Any:
        import transformers

        return getattr(transformers, kind)(
            getattr(transformers, images)(**QWEN_IMAGES),
            tokenizer,
            getattr(transformers, videos)(**QWEN_IMAGES),
        )

    return make


def _square_processor(kind: str, images: str, **values: Any) -> Callable[[Any], Any]:
    def make(tokenizer: Any) -> Any:
        import transformers

        return getattr(transformers, kind)(
            getattr(transformers, images)(size=SQUARE), tokenizer, **values
        )

    return make


def _idefics3_processor(tokenizer: Any) -> Any:
    import transformers

    edge = {"longest_edge": 32}
    images = transformers.Idefics3ImageProcessor(
        size=edge, max_image_size=edge, do_image_splitting=False
    )
    return transformers.Idefics3Processor(images, tokenizer, image_seq_len=4)


def _internvl_processor(tokenizer: Any) -> Any:
    import transformers

    return transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=SQUARE, max_patches=4),
        tokenizer,
        transformers.InternVLVideoProcessor(size=SQUARE),
        image_seq_length=4,
    )


def _pixtral_processor(tokenizer: Any) -> Any:
    import transformers

    images = transformers.PixtralImageProcessor(
        patch_size={"height": 8, "width": 8}, size={"longest_edge": 32}
    )
    return transformers.PixtralProcessor(
        images,
        tokenizer,
        patch_size=8,
        spatial_merge_size=2,
        image_token="<image>",
        image_break_token="<break>",
        image_end_token="<end>",
    )


PROCESSORS: dict[str, Callable[[Any], Any]] = {
    "llava": _llava_processor,
    "qwen2_vl": _qwen_processor("Qwen2VLProcessor"),
    "qwen2_5_vl": _qwen_processor("Qwen2_5_VLProcessor"),
    "qwen3_vl": _qwen_processor("Qwen3VLProcessor", videos="Qwen3VLVideoProcessor"),
    "qwen3_vl_deepstack": _qwen_processor("Qwen3VLProcessor", videos="Qwen3VLVideoProcessor"),
    "idefics3": _idefics3_processor,
    "internvl": _internvl_processor,
    "mistral3": _pixtral_processor,
    # vLLM runs those from here on as Transformers' classes, and then asks for their processors.
    "aya_vision": _square_processor(
        "AyaVisionProcessor",
        "GotOcr2ImageProcessor",
        patch_size=8,
        img_size=32,
        image_token="<image>",
        start_of_img_token="<start>",
        end_of_img_token="<end>",
        img_patch_token="<image>",
        img_line_break_token="<break>",
        tile_token="<video>",
        tile_global_token="<global-img>",
    ),
    "deepseek_vl": _square_processor(
        "DeepseekVLProcessor", "DeepseekVLImageProcessor", num_image_tokens=16
    ),
    "emu3": _square_processor("Emu3Processor", "Emu3ImageProcessor"),
    "glm46v": _qwen_processor("Glm46VProcessor", "Glm46VImageProcessor", "Glm46VVideoProcessor"),
    "got_ocr2": _square_processor("GotOcr2Processor", "GotOcr2ImageProcessor"),
    "hunyuan_vl": _square_processor("HunYuanVLProcessor", "HunYuanVLImageProcessor"),
    "hyperclovax_vision": _qwen_processor("HyperCLOVAXVisionV2Processor"),
    "idefics2": _square_processor("Idefics2Processor", "Idefics2ImageProcessor", image_seq_len=4),
    "lighton_ocr": _square_processor(
        "LightOnOcrProcessor", "PixtralImageProcessor", patch_size=8, spatial_merge_size=2
    ),
    "ovis2": _square_processor(
        "Ovis2Processor", "Ovis2ImageProcessor", image_token="<image>", image_seq_length=16
    ),
    "video_llama3": _qwen_processor(
        "VideoLlama3Processor", "VideoLlama3ImageProcessor", "VideoLlama3VideoProcessor"
    ),
    "vipllava": _llava_processor,
}
"""Makers of processors, from a tokenizer."""

QWEN_PROMPT = "Look: <start><image><end> and say"
IMAGE_PROMPTS = {
    name: {"prompt": prompt, "images": [{"size": [56, 40], "seed": 0}]}
    for name, prompt in (
        *(
            (name, "Look: <image> and say")
            for name in ("llava", "idefics3", "internvl", "mistral3")
        ),
        *(
            (name, QWEN_PROMPT)
            for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_deepstack")
        ),
    )
}


def image_job(name: str, path: Path) -> dict[str, Any]:
    """An engine's start with one prompt that shows an image, for `engine_jobs`."""
    from engines import NEW_TOKENS

    return {
        "model": str(path),
        "overrides": {},
        "prompts": [IMAGE_PROMPTS[name]],
        "max_tokens": NEW_TOKENS,
        "engine": {"limit_mm_per_prompt": {"image": 1}, "max_num_batched_tokens": 256},
    }


def image_answer(name: str, path: Path, model: Any) -> dict[str, Any]:
    """What a Transformers model answers the same prompt, in the form of an engine's result."""
    import torch
    from transformers import AutoProcessor

    from engine_jobs import make_image
    from engines import NEW_TOKENS

    prompt = IMAGE_PROMPTS[name]
    inputs = AutoProcessor.from_pretrained(path)(
        text=prompt["prompt"],
        images=[make_image(image) for image in prompt["images"]],
        return_tensors="pt",
    )
    del inputs["attention_mask"]
    ids = inputs.pop("input_ids")
    length = ids.shape[1]
    tokens: list[int] = []
    logprobs: list[float] = []
    with torch.no_grad():
        while len(tokens) < NEW_TOKENS:
            # Without a cache, as elsewhere: what is said of each token is said of new ones, too.
            more = {
                key: torch.nn.functional.pad(value, (0, len(tokens)))
                if key in ("token_type_ids", "mm_token_type_ids")
                else value
                for key, value in inputs.items()
            }
            logits = model(input_ids=ids, **more, use_cache=False).logits.float()
            if not tokens:
                known = logits.log_softmax(-1)[0, :-1]
                logprobs = known.gather(1, ids[0, 1:, None])[:, 0].tolist()
            tokens.append(int(logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([[tokens[-1]]])], dim=1)
    return {"prompts": [ids[0, :length].tolist()], "logprobs": [logprobs], "tokens": [tokens]}


NOT_EQUAL = {
    "Blip2ForConditionalGeneration": "Transformers' forward wants an image",
    "CohereCompassForConditionalGeneration": "differs by 5e-2 from the third token on",
    "Cosmos3EdgeForConditionalGeneration": "vLLM looks for the published folders only",
    "Ernie4_5_VLMoeForConditionalGeneration": "vLLM wants lists that Transformers refuses",
    "Gemma3nForConditionalGeneration": "Transformers' vision tower needs timm",
    "Lfm2VlForConditionalGeneration": "differs by 0.4; has short convolutions",
    "MiniMaxM3SparseForConditionalGeneration": "vLLM refuses the activation silu",
    "Step3p7ForConditionalGeneration": "vLLM wants names that configs saved today lack",
    "VoxtralForConditionalGeneration": "vLLM knows the names of Mistral's format only",
}
"""Architectures whose dense model was tried and is not the same in both, and why."""
