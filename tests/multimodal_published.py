"""Tiny multimodal checkpoints in their published formats and names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _change_tensors(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
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
    change_config(folder, lambda c: c["vision_config"].update(image_size=32, patch_size=8))


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
