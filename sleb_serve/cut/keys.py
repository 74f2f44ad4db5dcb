"""Config keys that describe a decoder's layers."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from sleb_serve.checkpoint.decoder import (
    words,
)

PER_LAYER = words(
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
"""Keys of lists with one value per layer; extra values belong to layers after the last."""


LAYER_LETTERS = frozenset(("hybrid_override_pattern", "index_topk_pattern", "layer_pattern"))
"""Keys of strings with one letter per layer."""


REPEATED = frozenset(("interleaved_sliding_window",))
"""Keys of lists that repeat until every layer has a value."""


BY_LAYER = frozenset(("per_layer_config",))
"""Keys of dicts by layer number; other entries describe the remaining layers."""


LAYER_NUMBERS = words(
    "attn_layer_indices cross_attention_layers dense_layers full_attn_idxs global_attn_idx "
    "global_attn_layers hybrid_layer_ids local_layer_ids mlp_only_layers moe_layers "
    "moe_layers_enum rope_scaling_layers"
)
"""Keys that list layers by number, also as a comma-separated string."""


FROM_ONE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"linear_attn_config": ("kda_layers", "full_attn_layers")}
)
"""Nested configs with lists of layer numbers, counted from one, and their keys."""


FIRST_LAYERS = words(
    "first_k_dense_replace max_window_layers moe_layer_start_index num_dense_layers num_hash_layers"
)
"""Keys that count the first layers of a type; Ernie's has one number per expert type."""


LAST_LAYERS = frozenset(("num_kv_shared_layers",))
"""Keys that count the last layers of a type."""


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
"""Keys that set a type for every nth layer, and the equivalent per-layer lists."""


SCALED = "scale_depth"
"""MiniCPM scales each layer's output by this over the root of the layer count."""


NUMBERED = words("bskcn_1 bskcn_2 bskcn_3 bskcn_4 scale_attn_by_inverse_layer_idx")
"""Keys that make layers compute with their own numbers, if set."""


FED_FIRST, FED_BY_MAP = "deepstack_visual_indexes", "deepstack_layer_map"


FED_LAYERS = "spatial_target_layers"
"""Keys that list decoder layers with input from a vision tower."""


NOT_PER_LAYER = words(
    "architectures begin_suppress_tokens bos_token_id eos_token_id image_grid_pinpoints "
    "keys_to_ignore_at_inference pad_token_id special_token_ids suppress_tokens"
)
"""Keys of lists that are never per layer, regardless of their length."""


SLICED: Mapping[str, int] = MappingProxyType(
    {"embed_tokens_per_layer": 1, "per_layer_model_projection": 0}
)
"""Modules with one matrix for all layers, and the dimension split by layer."""


LAST_EXPERT = "moe_layer_end_index"
"""Ernie's last layer with experts; negative values count from the end."""


BY_COUNT = FIRST_LAYERS | LAST_LAYERS | {SCALED}
