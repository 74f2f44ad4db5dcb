"""Tiny multimodal models: six decoder blocks, and towers with another number if possible."""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

from multimodal_audio import SOUND
from multimodal_images import PROCESSORS
from multimodal_published import AS_PUBLISHED, PUBLISHED, change_config
from multimodal_rotary import ROTARY
from multimodal_towers import SPECIAL
from multimodal_vision import VISION
from tiny import Tiny

TINY: dict[str, Tiny] = {**VISION, **ROTARY, **SOUND}


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


def published(name: str, folder: Path) -> None:
    """A model of `PUBLISHED` with the config that its family has on the hub."""
    save(name, folder)
    change_config(folder, PUBLISHED[name])


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
