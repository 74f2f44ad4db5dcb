"""Which part of a config and which tensors are the decoder's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sleb_serve.errors import SlebError

_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")

COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""`num_hidden_layers` goes by these names in config.json; Transformers maps them."""


MAX_BLOCKS = 100_000
"""More blocks than any model has; keeps a hostile block count from costing memory."""


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
"""Where models of several parts keep the decoder's config, the first that counts layers."""


def words(text: str) -> frozenset[str]:
    """The words of a text, for tables of keys."""
    return frozenset(text.split())


TOWERS = words(
    "adapter aligner audio audio_encoder audio_model audio_projection audio_tower code2wav "
    "code_predictor connector depth_decoder embed_audio embed_vision encoder image_encoder "
    "mm_projector modality_projection mtp multi_modal_projector perceiver projector qformer "
    "resampler sam_model speech_encoder speech_tower talker token2wav vision vision_backbone "
    "vision_embed_tokens vision_encoder vision_model vision_module vision_tower visual "
    "visual_encoder visual_tokenizer vit vpm vqmodel"
)
"""Parts of tensors' names that lead into a model's other parts, not into its decoder."""


COUNTED = ("layers_block_type", "hybrid_override_pattern")
"""Keys whose entries are counted where no key says the number: Nemotron-H's."""


def count_of(values: Mapping[str, Any]) -> int | None:
    """How many layers a config counts; None if it does not say."""
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
    """The keys that lead to the decoder's entries in a config; None if none counts layers."""
    for path in (*DECODER_PATHS, ()):
        values = at(config, path)
        if values is not None and count_of(values) is not None:
            return path
    return None


def at(config: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any] | None:
    """The nested config at `path`; None if there is none."""
    for key in path:
        nested = config.get(key)
        if not isinstance(nested, Mapping):
            return None
        config = nested
    return config


def number_after(name: str, prefix: str) -> int | None:
    """The number that follows `prefix` in a dotted name; None if there is none."""
    if not name.startswith(prefix):
        return None
    number = name[len(prefix) :].partition(".")[0]
    return _number(number)


def decoder_prefix(names: Iterable[str], count: int) -> str:
    """What comes before the layer numbers in the names of the decoder's tensors.

    Args:
        names: of a checkpoint's tensors.
        count: how many layers the config counts.

    Raises:
        SlebError: the tensors are of fewer layers, or several parts of the model have so many.
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
    """A layer's number as names spell it: in ASCII, without zeros before it."""
    return int(text) if _NUMBER.fullmatch(text) else None
