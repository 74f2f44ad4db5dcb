"""Tiny models with audio input, some also with images."""

from __future__ import annotations

from multimodal_towers import (
    AUDIO,
    DEEPSTACK,
    IMAGE,
    LLAMA_TEXT,
    MOE,
    QWEN2_TEXT,
    QWEN3_TEXT,
    VIDEO,
    WINDOWED,
    audio_tower,
    granite_speech,
    mrope,
    qwen_tower,
    speech_tower,
    tiny,
)
from tiny import HEAD, LLAMA, Tiny

SOUND: dict[str, Tiny] = {
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
    "granite_speech": granite_speech("GraniteSpeechConfig", 2),
    "granite_speech_plus": granite_speech("GraniteSpeechPlusConfig", 6),
    "qwen3_asr": tiny(
        "Qwen3ASRConfig",
        text_config=QWEN3_TEXT,
        audio_config=audio_tower("qwen3_asr_encoder", 3, output_dim=128, downsample_hidden_size=16),
        audio_token_id=AUDIO,
        timestamp_token_id=264,
        pad_token_id=0,
        eos_token_id=2,
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
