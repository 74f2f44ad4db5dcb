"""Processors of tiny multimodal models, and prompts with images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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
IMAGE_PROMPTS: dict[str, dict[str, Any]] = {
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


def image_answer(name: str, path: Path, model: Any, tokens: list[int]) -> dict[str, Any]:
    """Score the same prompt and an engine's continuation with a Transformers model.

    One pass over both, without a cache: `logprobs` of the prompt, and by how much each new token
    is `behind` the likeliest there.
    """
    import torch
    from transformers import AutoProcessor

    from engine_jobs import make_image

    prompt = IMAGE_PROMPTS[name]
    inputs = AutoProcessor.from_pretrained(path)(
        text=prompt["prompt"],
        images=[make_image(image) for image in prompt["images"]],
        return_tensors="pt",
    )
    del inputs["attention_mask"]
    ids = inputs.pop("input_ids")
    length = ids.shape[1]
    # What is said of each token is said of new ones, too.
    more = {
        key: torch.nn.functional.pad(value, (0, len(tokens)))
        if key in ("token_type_ids", "mm_token_type_ids")
        else value
        for key, value in inputs.items()
    }
    whole = torch.cat([ids, torch.tensor([tokens])], dim=1)
    with torch.no_grad():
        logits = model(input_ids=whole, **more, use_cache=False).logits[0].float()
    known = logits[: length - 1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    said = logits[length - 1 : -1]
    behind = said.max(-1).values - said.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return {
        "prompts": [ids[0].tolist()],
        "logprobs": [known.tolist()],
        "behind": behind.tolist(),
    }
