"""What the keys of configs say of a decoder's layers."""

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
"""Keys that may hold a list with one value a layer; more values are of layers behind the last."""


LAYER_LETTERS = frozenset(("hybrid_override_pattern", "index_topk_pattern", "layer_pattern"))
"""Keys that may hold a string with one letter a layer."""


REPEATED = frozenset(("interleaved_sliding_window",))
"""Keys whose list is repeated until every layer has a value."""


BY_LAYER = frozenset(("per_layer_config",))
"""Keys that may hold a dict by layer number; layers that are not named are as the rest says."""


LAYER_NUMBERS = words(
    "attn_layer_indices cross_attention_layers dense_layers full_attn_idxs global_attn_idx "
    "global_attn_layers hybrid_layer_ids local_layer_ids mlp_only_layers moe_layers "
    "moe_layers_enum rope_scaling_layers"
)
"""Keys that list layers by number, or name the numbers in a string, with commas."""


FROM_ONE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"linear_attn_config": ("kda_layers", "full_attn_layers")}
)
"""Nested configs that list layers by number, counted from one, and the keys that do."""


FIRST_LAYERS = words(
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


NUMBERED = words("bskcn_1 bskcn_2 bskcn_3 bskcn_4 scale_attn_by_inverse_layer_idx")
"""Keys that make layers compute with their own numbers, where they say anything."""


FED_FIRST, FED_BY_MAP = "deepstack_visual_indexes", "deepstack_layer_map"


FED_LAYERS = "spatial_target_layers"
"""Keys that tell which decoder layers take in what a vision tower gives."""


NOT_PER_LAYER = words(
    "architectures begin_suppress_tokens bos_token_id eos_token_id image_grid_pinpoints "
    "keys_to_ignore_at_inference pad_token_id special_token_ids suppress_tokens"
)
"""Keys whose lists are never by layer, however long."""


SLICED: Mapping[str, int] = MappingProxyType(
    {"embed_tokens_per_layer": 1, "per_layer_model_projection": 0}
)
"""Modules with a part for each layer in one matrix, and the dimension that is divided."""


LAST_EXPERT = "moe_layer_end_index"
"""Ernie's last layer with experts, counted from the end below zero."""


BY_COUNT = FIRST_LAYERS | LAST_LAYERS | {SCALED}
