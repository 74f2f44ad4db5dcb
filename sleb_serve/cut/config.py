"""A pruned model is an ordinary model with fewer layers: its config, and its tensors' names.

Serving, export, drafts, selection and evaluation all cut with this module. It works on plain JSON
values and knows neither torch nor Transformers; `sleb_serve.cut.likeness` compares the result with
the dense model, layer by layer.

What a config says of its layers is of a few forms: a value a layer (a list, a string, a dict by
layer number), a list of layer numbers, how many of the first or the last layers are of a kind, or
that every nth layer is. The last cannot be said of fewer layers, so Transformers' own derivation is
made explicit before (see `explicit`); where that is not possible, the cut is refused by the key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

from sleb_serve.cut.quantisation import QUANTISATION_KEYS, Names, renumbered
from sleb_serve.errors import SlebError
from sleb_serve.utils.strict_json import short

COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""`num_hidden_layers` goes by these names in config.json; Transformers maps them."""

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


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


PER_LAYER = _keys(
    "activation_sparsity_pattern attention_layers attn_layer_types attn_type_list block_configs "
    "compress_ratios ffn_multipliers head_dim hybrid_layer_pattern index_topk_pattern "
    "indexer_types intermediate_size is_moe_layer layer_attention_types layer_rope_theta "
    "layer_types "
    "layers_block_type layers_num_experts mlp_layer_types moe_layer_freq no_rope_layers "
    "num_attention_heads num_attention_heads_per_layer num_experts num_key_value_heads "
    "num_key_value_heads_per_layer num_query_heads partial_rotary_factors rope_layers "
    "sliding_window_layers sliding_window_list sliding_windows swiglu_limits swiglu_limits_shared "
    "use_gated_ffn"
)
"""Keys that may hold a list with one value a layer; more values are of layers behind the last."""

LAYER_LETTERS = frozenset(("hybrid_override_pattern", "index_topk_pattern", "layer_pattern"))
"""Keys that may hold a string with one letter a layer."""

REPEATED = frozenset(("interleaved_sliding_window",))
"""Keys whose list is repeated until every layer has a value."""

BY_LAYER = frozenset(("per_layer_config",))
"""Keys that may hold a dict by layer number; layers that are not named are as the rest says."""

LAYER_NUMBERS = _keys(
    "attn_layer_indices cross_attention_layers dense_layers full_attn_idxs global_attn_idx "
    "global_attn_layers hybrid_layer_ids local_layer_ids mlp_only_layers moe_layers "
    "moe_layers_enum rope_scaling_layers"
)
"""Keys that list layers by number, or name the numbers in a string, with commas."""

FROM_ONE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"linear_attn_config": ("kda_layers", "full_attn_layers")}
)
"""Nested configs that list layers by number, counted from one, and the keys that do."""

FIRST_LAYERS = _keys(
    "first_k_dense_replace max_window_layers moe_layer_start_index num_dense_layers num_hash_layers"
)
"""Keys that count the first layers of a kind; Ernie's has one number for each kind of expert."""

LAST_LAYERS = frozenset(("num_kv_shared_layers",))
"""Keys that count the last layers of a kind."""

EVERY_NTH: Mapping[str, str | None] = MappingProxyType(
    {
        "attn_layer_period": "layers_block_type",
        "block_attn_every": "layer_types",
        "decoder_sparse_step": "mlp_only_layers",
        "expert_layer_period": None,
        "full_attention_interval": "layer_types",
        "global_attn_every_n_layers": "layer_types",
        "interleave_moe_layer_step": "moe_layers",
        "layer_group_size": None,
        "moe_every_n_layers": None,
        "moe_layer_freq": None,
        "moe_layer_interval": None,
        "no_rope_layer_interval": "no_rope_layers",
        "sliding_window_pattern": "layer_types",
        "_sliding_window_pattern": "layer_types",
        "interleaved_sliding_window_pattern": "layer_types",
    }
)
"""Keys by which every nth layer is of a kind, and the list that says the same of each layer."""

SCALED = "scale_depth"
"""MiniCPM multiplies what layers add to the stream by this over the root of their number."""

NUMBERED = _keys("bskcn_1 bskcn_2 bskcn_3 bskcn_4 scale_attn_by_inverse_layer_idx")
"""Keys that make layers compute with their own numbers, where they say anything."""

_FIRST, _MAP = "deepstack_visual_indexes", "deepstack_layer_map"
_TARGETS = "spatial_target_layers"
"""Keys that tell which decoder layers take in what a vision tower gives."""

NOT_PER_LAYER = _keys(
    "architectures begin_suppress_tokens bos_token_id eos_token_id image_grid_pinpoints "
    "keys_to_ignore_at_inference pad_token_id special_token_ids suppress_tokens"
)
"""Keys whose lists are never by layer, however long."""

SLICED: Mapping[str, int] = MappingProxyType(
    {"embed_tokens_per_layer": 1, "per_layer_model_projection": 0}
)
"""Modules with a part for each layer in one matrix, and the dimension that is divided."""

TOWERS = _keys(
    "adapter aligner audio audio_encoder audio_model audio_projection audio_tower code2wav "
    "code_predictor connector depth_decoder embed_audio embed_vision encoder image_encoder "
    "mm_projector modality_projection mtp multi_modal_projector perceiver projector qformer "
    "resampler sam_model speech_encoder speech_tower talker token2wav vision vision_backbone "
    "vision_embed_tokens vision_encoder vision_model vision_module vision_tower visual "
    "visual_encoder visual_tokenizer vit vpm vqmodel"
)
"""Parts of tensors' names that lead into a model's other parts, not into its decoder."""

_LAST_EXPERT = "moe_layer_end_index"
"""Ernie's last layer with experts, counted from the end below zero."""

_COUNTED = ("layers_block_type", "hybrid_override_pattern")
"""Keys whose entries are counted where no key says the number: Nemotron-H's."""
_BY_COUNT = FIRST_LAYERS | LAST_LAYERS | {SCALED}
INSTEAD = "remove other blocks, or serve the dense model"
"""What a refused cut leaves to do: the end of an error."""


@dataclass(frozen=True)
class Cut:
    """A decoder of `num_blocks` layers and those it loses; those that stay get new numbers."""

    num_blocks: int
    removed: tuple[int, ...]

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """The blocks that stay, by their number in the dense model."""
        gone = set(self.removed)
        return tuple(index for index in range(self.num_blocks) if index not in gone)

    @cached_property
    def places(self) -> dict[int, int]:
        """The new number of each block that stays."""
        return {old: new for new, old in enumerate(self.kept)}

    def place(self, block: int) -> int | None:
        """The new number of a block; None if it is removed.

        Layers behind the last, for multi-token prediction, move up behind the last that stays.
        """
        if block >= self.num_blocks:
            return block - len(self.removed)
        return self.places.get(block)

    def name(self, name: str, prefix: str) -> str | None:
        """The name of a tensor or module of the dense model in the cut one; None if it is removed.

        Args:
            name: as in the checkpoint.
            prefix: what comes before the decoder's layer numbers, as `decoder_prefix` finds it.
        """
        block = number_after(name, prefix)
        if block is None:
            return name
        place = self.place(block)
        rest = name[len(prefix) + len(str(block)) :]
        return None if place is None else f"{prefix}{place}{rest}"

    def parts(self, name: str, shape: Sequence[int]) -> int | None:
        """The dimension of a tensor that has a part for each layer, of which removed ones go."""
        module = name.split(".")[-2:-1]
        dimension = SLICED.get(module[0]) if module else None
        if dimension is None or dimension >= len(shape) or shape[dimension] % self.num_blocks:
            return None
        return dimension

    def values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What a decoder's config says of the layers that stay.

        Args:
            values: the config's entries, without those of nested configs.

        Raises:
            SlebError: it says of the layers what cannot be said once some are gone, or what is not
                known here; the message names the key.
        """
        self._check_sharing(values)
        said = {**self._sparse_step(values), **self._indexers(values)}
        cut = {**values, **said}
        for key, value in values.items():
            if key not in said:
                with _read_as_layers(key, value):
                    cut[key] = self._value(key, value, values)
        return cut

    def _value(self, key: str, value: Any, values: Mapping[str, Any]) -> Any:
        number = value if isinstance(value, int) and not isinstance(value, bool) else None
        if key in COUNT_KEYS and number == self.num_blocks:
            return len(self.kept)
        if key == SCALED and isinstance(value, int | float) and value:
            return value * math.sqrt(len(self.kept) / self.num_blocks)
        if key in FIRST_LAYERS or key == _LAST_EXPERT:
            return self._bound(key, value)
        if key in LAYER_NUMBERS:
            return self._numbers(key, value)
        if key in FROM_ONE and isinstance(value, Mapping):
            return {
                name: [n + 1 for n in self._numbers(name, [number - 1 for number in numbers])]
                if name in FROM_ONE[key] and numbers is not None
                else numbers
                for name, numbers in value.items()
            }
        if key in LAST_LAYERS and number:
            return sum(index >= self.num_blocks - number for index in self.kept)
        if key in REPEATED and isinstance(value, list) and value:
            return [value[index % len(value)] for index in self.kept]
        if key in BY_LAYER and isinstance(value, Mapping):
            return {
                str(self.places[int(index)]): entry
                for index, entry in value.items()
                if int(index) in self.places
            }
        if key in EVERY_NTH and number is not None and number > 1:
            self._check_period(key, number, values)
        if key in NUMBERED and value:
            raise SlebError(
                f"{key}: layers compute with their own number, which changes when layers before "
                f"them go; {INSTEAD}"
            )
        if key in LAYER_LETTERS and isinstance(value, str) and len(value) >= self.num_blocks:
            return "".join(self._each(value))
        if key in PER_LAYER and isinstance(value, list) and len(value) >= self.num_blocks > 1:
            return self._each(value)
        listed = isinstance(value, list) and len(value) == self.num_blocks > 1
        if listed and key not in NOT_PER_LAYER:
            raise SlebError(
                f"{key} lists {len(value)} values, one a layer as it seems, which this version "
                f"does not know; {INSTEAD}"
            )
        return value

    def _each(self, value: Sequence[Any]) -> list[Any]:
        """The values of the layers that stay, and of those behind the last."""
        return [*(value[index] for index in self.kept), *value[self.num_blocks :]]

    def _numbers(self, key: str, value: Any) -> Any:
        """Layers by number, as a list or in a string; an empty string is another model's."""
        if isinstance(value, list):
            if any(not isinstance(i, int) or isinstance(i, bool) for i in value):
                raise ValueError(key)
            return [place for i in value if (place := self.place(i)) is not None]
        if not isinstance(value, str):
            return value
        places = [self.place(int(part)) for part in value.strip().split(",")]
        left = [str(place) for place in places if place is not None]
        if not left:
            raise SlebError(f"{key}: no layer that it names would stay; {INSTEAD}")
        return ",".join(left)

    def _bound(self, key: str, value: Any) -> Any:
        """The number up to, or from, which layers are of a kind, or several such numbers."""
        if isinstance(value, list):
            return [self._bound(key, entry) for entry in value]
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        if key == _LAST_EXPERT and value < 0:
            return value
        if key == _LAST_EXPERT:
            # Not below zero, which would count from the end.
            if self.kept[0] > value:
                raise SlebError(f"{key}: no layer up to {value} would stay; {INSTEAD}")
            return sum(index <= value for index in self.kept) - 1
        return sum(index < value for index in self.kept)

    def _check_period(self, key: str, period: int, values: Mapping[str, Any]) -> None:
        explicit = values.get(EVERY_NTH[key] or "")
        if isinstance(explicit, list) and explicit:
            return
        for old, new in self.places.items():
            if (old - new) % period:
                raise SlebError(
                    f"{key} makes every {period}th layer another kind, which cannot be said once "
                    f"layer {old} is number {new}; {INSTEAD}"
                )

    def _sparse_step(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Qwen's MoE: every nth layer has experts unless it is listed; all others are listed."""
        step = values.get("decoder_sparse_step")
        if not isinstance(step, int) or step <= 1:
            return {}
        listed = values.get("mlp_only_layers") or []
        with _read_as_layers("mlp_only_layers", listed):
            plain = [i for i in self.kept if i in listed or (i + 1) % step]
        return {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [self.places[index] for index in plain],
        }

    def _indexers(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """DeepSeek's sparse attention: every nth layer has an indexer, said layer by layer."""
        period = values.get("index_topk_freq")
        if not isinstance(period, int) or period <= 1 or values.get("index_topk_pattern"):
            return {}
        first = values.get("index_skip_topk_offset", 2)
        shares = [max(index - first + 1, 0) % period for index in self.kept]
        return {"index_topk_pattern": "".join("S" if share else "F" for share in shares)}

    def _check_sharing(self, values: Mapping[str, Any]) -> None:
        lost = sorted(set(self.removed) & self.needed(values))
        if lost:
            raise SlebError(
                f"block {lost[0]} holds the keys and values that later blocks use "
                f"(num_kv_shared_layers), so it cannot be removed without them; {INSTEAD}"
            )

    def needed(self, values: Mapping[str, Any]) -> frozenset[int]:
        """Blocks whose keys and values a block that stays uses."""
        return frozenset(
            source
            for source, users in shared_sources(values, self.num_blocks).items()
            if users & set(self.kept)
        )


@contextmanager
def _read_as_layers(key: str, value: Any) -> Iterator[None]:
    """While open, a value that turns out not to be of the form that its key has is refused."""
    try:
        yield
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise SlebError(
            f"{key} is {short(value)}, which says nothing of layers; correct the config"
        ) from error


def removable(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The blocks of which each can be removed alone.

    Args:
        config: a whole config.json, or what Transformers made of one.

    Raises:
        SlebError: there is none; the message says why the first cannot.
    """
    values = at(config, decoder_path(config) or ()) or {}
    num_blocks = count_of(values) or 0
    found: list[int] = []
    first: SlebError | None = None
    for block in range(num_blocks):
        cut = Cut(num_blocks, (block,))
        try:
            check_entries(config, cut)
            cut.values(values)
            found.append(block)
        except SlebError as error:
            first = first or error
    if not found and first is not None:
        raise first
    return tuple(found)


def shared_sources(values: Mapping[str, Any], num_blocks: int) -> dict[int, frozenset[int]]:
    """Blocks whose keys and values later blocks use, and these.

    As Gemma 3n and 4 do: the last ``num_kv_shared_layers`` blocks have none of their own and take
    those of the last block of their attention type before them.
    """
    shared = values.get("num_kv_shared_layers")
    if not isinstance(shared, int) or isinstance(shared, bool) or not 0 < shared < num_blocks:
        return {}
    types = values.get("layer_types")
    if not isinstance(types, list) or len(types) != num_blocks:
        types = [None] * num_blocks
    first = num_blocks - shared
    users: dict[int, set[int]] = {}
    for block in range(first, num_blocks):
        sources = [index for index in range(first) if types[index] == types[block]]
        if sources:
            users.setdefault(sources[-1], set()).add(block)
    return {source: frozenset(blocks) for source, blocks in users.items()}


def check_entries(config: Mapping[str, Any], cut: Cut) -> None:
    """Refuse to remove blocks into which another part of the model feeds.

    Args:
        config: a whole config, of all parts.
        cut: the layers that go.

    Raises:
        SlebError: naming the block and the key.
    """
    for part in _parts(config):
        for key in (_FIRST, _MAP, _TARGETS):
            with _read_as_layers(key, part.get(key)):
                lost = sorted(set(_entries(key, part.get(key) or ())) & set(cut.removed))
            if lost:
                raise SlebError(
                    f"block {lost[0]} takes in what a vision tower gives ({key}), so it cannot be "
                    f"removed; {INSTEAD}"
                )


def cut_entries(values: Mapping[str, Any], cut: Cut) -> dict[str, Any]:
    """What a config says of the decoder layers that a vision tower feeds, renumbered."""
    found: dict[str, Any] = {}
    if values.get(_MAP):
        found[_MAP] = [[tower, cut.place(layer)] for tower, layer in values[_MAP]]
    if values.get(_TARGETS):
        found[_TARGETS] = [cut.place(layer) for layer in values[_TARGETS]]
    return found


def _entries(key: str, value: Any) -> list[int]:
    """The decoder layers that take in what a vision tower gives, as one of its keys says."""
    if key == _FIRST:
        # The tower's layers listed there feed the decoder's first, as many.
        return list(range(len(value)))
    return [layer for _, layer in value] if key == _MAP else list(value)


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A config and those nested in it."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _parts(value)


def count_of(values: Mapping[str, Any]) -> int | None:
    """How many layers a config counts; None if it does not say."""
    for key in COUNT_KEYS:
        value = values.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    for key in _COUNTED:
        value = values.get(key)
        if isinstance(value, list | str) and value:
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


def cut_config(config: Mapping[str, Any], cut: Cut, names: Names | None = None) -> dict[str, Any]:
    """The config of the shorter model: `config` with what it says of its decoder's layers cut.

    Args:
        config: a whole config.json, or what Transformers made of one.
        cut: the layers that go.
        names: of the checkpoint's modules, by which quantisation configs name layers; None where
            the config has none.

    Raises:
        SlebError: see `Cut.values`.
    """
    path = decoder_path(config)
    if path is None:
        raise SlebError("the config does not say how many layers the model has")
    check_entries(config, cut)
    result = _replaced(config, path, cut.values)
    if path and count_of(config) == cut.num_blocks:
        # Some repeat the decoder's entries outside.
        result.update(cut.values({k: v for k, v in config.items() if k not in path}))
    result.update(cut_entries(config, cut))
    return result if names is None else with_names(result, names)


def with_names(config: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """A config with the layers that its quantisation names numbered as in the shorter model.

    Args:
        config: a whole config, or the decoder's.
        names: of the checkpoint's modules.
    """
    result = dict(config)
    for place in dict.fromkeys(((), decoder_path(config) or ())):
        for key in QUANTISATION_KEYS:
            quantisation = (at(result, place) or {}).get(key)
            if isinstance(quantisation, Mapping):
                new = {key: renumbered(quantisation, names)}
                result = _replaced(result, place, partial(_updated, new))
    return result


def _updated(new: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {**values, **new}


def explicit(config: Mapping[str, Any], derived: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with what Transformers derives of it for each layer said in so many words.

    Args:
        config: config.json, which may leave a layer's kind to its position.
        derived: what Transformers made of it.
    """
    path, other = decoder_path(config), decoder_path(derived)
    if path is None or other is None:
        return dict(config)
    count = count_of(at(config, path) or {})
    found = at(derived, other) or {}

    def said(values: Mapping[str, Any]) -> dict[str, Any]:
        more = {
            key: value
            for key, value in found.items()
            if (not values.get(key) and _is_by_layer(key, value, count))
            or (values.get(key) is None and value is not None and key in _BY_COUNT)
        }
        return {**values, **more}

    return _replaced(config, path, said)


def _is_by_layer(key: str, value: Any, count: int | None) -> bool:
    if key in PER_LAYER or key in LAYER_LETTERS:
        return isinstance(value, list | str) and len(value) == count
    return bool(value) and key in LAYER_NUMBERS | BY_LAYER


def _replaced(
    config: Mapping[str, Any],
    path: Sequence[str],
    change: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> dict[str, Any]:
    if not path:
        return change(config)
    return {**config, path[0]: _replaced(config[path[0]], path[1:], change)}


def number_after(name: str, prefix: str) -> int | None:
    """The number that follows `prefix` in a dotted name; None if there is none."""
    if not name.startswith(prefix):
        return None
    number = name[len(prefix) :].partition(".")[0]
    return int(number) if number.isdecimal() and str(int(number)) == number else None


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
        if part.isdecimal():
            yield "".join(f"{p}." for p in parts[:place]), int(part)
            return
