"""Parts of tiny multimodal models: token numbers, towers, text models."""

from __future__ import annotations

from typing import Any

from tiny import HEAD, LLAMA, SLIDING, Tiny

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
# And vLLM's sequence is one token wider; none here reaches it.
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
