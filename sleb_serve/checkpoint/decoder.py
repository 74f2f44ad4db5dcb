"""The decoder's part of a config and its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sleb_serve.errors import SlebError

_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")

COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Other names of `num_hidden_layers` in config.json; Transformers maps them."""


MAX_BLOCKS = 100_000
"""More blocks than any model has; limits the memory that a malicious block count can use."""


DECODER_PATHS: tuple[tuple[str, ...], ...] = (
    ("text_config",),
    ("thinker_config", "text_config"),
    ("llm_config",),
    ("language_config",),
    ("language_model_config",),
    ("decoder",),
    ("generator",),
    ("talker_config", "text_config"),
)
"""Keys of the decoder's config in models with several parts; the first with a layer count
applies.
"""


def words(text: str) -> frozenset[str]:
    """Split a text into words, for tables of keys."""
    return frozenset(text.split())


TOWERS = words(
    "adapter aligner audio audio_encoder audio_model audio_projection audio_tower code2wav "
    "code_predictor connector depth_decoder embed_audio embed_vision encoder image_encoder "
    "mm_projector modality_projection mtp multi_modal_projector perceiver projector qformer "
    "resampler sam_model speech_encoder speech_tower talker token2wav vision vision_backbone "
    "vision_embed_tokens vision_encoder vision_model vision_module vision_tower visual "
    "visual_encoder visual_tokenizer vit vpm vqmodel"
)
"""Name components of tensors outside the decoder."""


COUNTED = ("layers_block_type", "hybrid_override_pattern")
"""Keys with one entry per layer, counted if no key has the number: Nemotron-H's."""


def count_of(values: Mapping[str, Any]) -> int | None:
    """Return a config's layer count; None if it has none."""
    for key in COUNT_KEYS:
        value = values.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_BLOCKS:
            return value
    for key in COUNTED:
        value = values.get(key)
        if isinstance(value, list | str) and 0 < len(value) <= MAX_BLOCKS:
            return len(value)
    return None


def decoder_path(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the path of the decoder's config; None if no part has a layer count."""
    for path in (*DECODER_PATHS, ()):
        values = at(config, path)
        if values is not None and count_of(values) is not None:
            return path
    return None


def at(config: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any] | None:
    """Return the nested config at `path`; None if there is none."""
    for key in path:
        nested = config.get(key)
        if not isinstance(nested, Mapping):
            return None
        config = nested
    return config


def number_after(name: str, prefix: str) -> int | None:
    """Return the number after `prefix` in a dotted name; None if there is none."""
    if not name.startswith(prefix):
        return None
    number = name[len(prefix) :].partition(".")[0]
    return _number(number)


def decoder_prefix(names: Iterable[str], count: int) -> str:
    """Find the prefix of the layer numbers in the decoder's tensor names.

    Args:
        names: names of a checkpoint's tensors.
        count: the config's layer count.

    Raises:
        SlebError: the tensors have fewer layers, or several parts of the model have this many.
    """
    numbers: dict[str, set[int]] = {}
    for name in names:
        for prefix, number in _first_number(name):
            numbers.setdefault(prefix, set()).add(number)
    decoders = [p for p in numbers if not TOWERS.intersection(p.split("."))] or list(numbers)
    whole = [prefix for prefix in decoders if numbers[prefix].issuperset(range(count))]
    if len(whole) == 1:
        return whole[0]
    if whole:
        raise SlebError(
            f"the checkpoint has {len(whole)} lists of {count} layers ({', '.join(sorted(whole))}) "
            f"where a decoder has one; this model cannot be pruned"
        )
    most = max(decoders, key=lambda prefix: len(numbers[prefix]), default=None)
    found = "none" if most is None else f"{len(numbers[most])}, under {most}"
    raise SlebError(
        f"the config counts {count} layers and the checkpoint has weights of {found}; download the "
        f"model again, or correct the config"
    )


def _first_number(name: str) -> Iterator[tuple[str, int]]:
    parts = name.split(".")
    for place, part in enumerate(parts):
        number = _number(part)
        if number is not None:
            yield "".join(f"{p}." for p in parts[:place]), number
            return


def _number(text: str) -> int | None:
    """Pattern of a layer number in names: ASCII digits without leading zeros."""
    return int(text) if _NUMBER.fullmatch(text) else None
