"""Each decoder block's cache from the config: KV cache, window, latent, state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sleb_serve.checkpoint.decoder import count_of
from sleb_serve.errors import SlebError
from sleb_serve.roofline.model import BYTES, Cache
from sleb_serve.utils.strict_json import short

Values = Mapping[str, Any]
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_FULL = frozenset(("full_attention", "attention", "global", "*"))
_WINDOWED = frozenset(("sliding_attention", "local_attention", "chunked_attention", "local"))
_RECURRENT = frozenset(("linear_attention", "mamba", "conv", "M"))
_BOTH = frozenset(("hybrid",))
_NONE = frozenset(("mlp", "moe", "-", "E"))
_KINDS = ("layer_types", "layers_block_type")
_ALL_RECURRENT = frozenset(("mamba", "falcon_mamba", "mamba2"))
_ALL_BOTH = frozenset(("falcon_h1",))
_MULTI_QUERY = frozenset(("falcon", "gpt_bigcode"))
"""Model types in which ``multi_query`` means a single KV head."""
_EXPANDED = frozenset(("minicpm3",))
"""Model types with compressed keys and values that are cached expanded."""


def first(values: Values, keys: Sequence[str], default: int | None = None) -> int:
    """Return the first positive whole number of some keys.

    Raises:
        SlebError: there is none, and no default.
    """
    for key in keys:
        value = values.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    if default is None:
        raise SlebError(f"config.json says none of {', '.join(keys)}; give a Transformers config")
    return default


def _type(values: Values) -> str:
    return str(values.get("model_type"))


def hidden_of(values: Values) -> int:
    """Return the hidden size."""
    return first(values, _HIDDEN)


def heads_of(values: Values) -> int:
    """Return the number of attention heads; 0 in a model without attention."""
    return 0 if _type(values) in _ALL_RECURRENT else first(values, _HEADS, 0)


def caches_of(values: Values) -> tuple[Cache, ...]:
    """Return the cache of each decoder block.

    Args:
        values: the decoder's config, with Transformers' derived values if layer types depend on
            position.

    Raises:
        SlebError: it is incomplete, or has an unknown layer type.
    """
    count = count_of(values)
    if count is None:
        raise SlebError("config.json does not give the number of layers")
    return tuple(_cache(values, kind, number) for number, kind in enumerate(_kinds(values, count)))


def _kinds(values: Values, count: int) -> Sequence[str]:
    for key in _KINDS:
        listed = values.get(key)
        if isinstance(listed, list) and len(listed) >= count:
            return listed[:count]
    pattern = values.get("hybrid_override_pattern")
    if isinstance(pattern, str) and len(pattern) >= count:
        return list(pattern[:count])
    kind = _type(values)
    if kind in _ALL_RECURRENT:
        return ["mamba"] * count
    if kind in _ALL_BOTH:
        return ["hybrid"] * count
    if isinstance(values.get("attn_layer_period"), int):
        period = first(values, ("attn_layer_period",))
        offset = first(values, ("attn_layer_offset",), 0)
        return ["attention" if i % period == offset else "mamba" for i in range(count)]
    windowed = values.get("sliding_window") and values.get("use_sliding_window", True)
    return ["sliding_attention" if windowed else "full_attention"] * count


def _cache(values: Values, kind: object, number: int) -> Cache:
    if kind in _FULL:
        return _attention(values, number, None)
    if kind in _WINDOWED:
        key = "attention_chunk_size" if kind == "chunked_attention" else "sliding_window"
        return _attention(values, number, first(values, (key, "sliding_window", "local_attention")))
    if kind in _RECURRENT:
        return Cache(state=_state(values))
    if kind in _BOTH:
        whole = _attention(values, number, None)
        return Cache(whole.token, whole.window, _state(values), whole.width)
    if kind in _NONE:
        return Cache()
    raise SlebError(f"no plan for a layer of kind {short(kind)}: its cache is not known here")


def _attention(values: Values, number: int, window: int | None) -> Cache:
    heads = first(values, _HEADS)
    latent = first(values, ("kv_lora_rank",), 0)
    if latent and _type(values) in _EXPANDED:
        dim = first(values, ("qk_nope_head_dim",)) + first(values, ("qk_rope_head_dim",))
        return Cache(token=2 * heads * dim * BYTES, window=window, width=heads * dim)
    if latent:
        # One compressed latent and one rotary key for all heads; attention works on these.
        rotary = first(values, ("qk_rope_head_dim",))
        width = heads * (2 * latent + rotary) // 2
        return Cache(token=(latent + rotary) * BYTES, window=window, width=width)
    each = values.get("num_attention_heads_per_layer")
    if isinstance(each, list) and number < len(each):
        heads = first({"heads": each[number]}, ("heads",))
    kv_heads = first(values, _KV_HEADS, heads)
    if _type(values) in _MULTI_QUERY and values.get("multi_query"):
        kv_heads = 1 if not values.get("new_decoder_architecture") else kv_heads
    dim = first(values, ("attention_head_dim", "head_dim"), 0) or hidden_of(values) // heads
    value_dim = first(values, ("v_head_dim",), dim)
    if window is None and values.get("global_head_dim"):
        dim = value_dim = first(values, ("global_head_dim",))
        kv_heads = first(values, ("num_global_key_value_heads",), kv_heads)
    if window is not None and values.get("swa_head_dim"):
        dim = first(values, ("swa_head_dim",))
        value_dim = first(values, ("swa_v_head_dim",), dim)
        kv_heads = first(values, ("swa_num_key_value_heads",), kv_heads)
    token = kv_heads * (dim + value_dim) * BYTES
    return Cache(token=token, window=window, width=heads * (dim + value_dim) // 2)


def _state(values: Values) -> int:
    """Return the bytes of a recurrent layer's state: convolution window and memory."""
    size = 4 if values.get("mamba_ssm_dtype") == "float32" else BYTES
    if "conv_L_cache" in values:
        return hidden_of(values) * (first(values, ("conv_L_cache",)) - 1) * BYTES
    if "linear_num_value_heads" in values:
        of_key, of_value = (first(values, (f"linear_{n}_head_dim",)) for n in ("key", "value"))
        keys = first(values, ("linear_num_key_heads",)) * of_key
        inner = first(values, ("linear_num_value_heads",)) * of_value
        back = (2 * keys + inner) * (first(values, ("linear_conv_kernel_dim",)) - 1)
        return back * BYTES + inner * of_key * size
    return _mamba(values, size)


def _mamba(values: Values, size: int) -> int:
    back = first(values, ("mamba_d_conv", "conv_kernel")) - 1
    memory = first(values, ("mamba_d_state", "ssm_state_size", "state_size"))
    heads = first(values, ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 0)
    dim = first(values, ("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 0)
    if _type(values) == "mamba2":
        heads, dim = first(values, ("num_heads",)), first(values, ("head_dim",))
    if heads and dim:
        groups = first(values, ("mamba_n_groups", "mamba_ngroups", "n_groups"), 1)
        inner = heads * dim
        return (inner + 2 * groups * memory) * back * BYTES + inner * memory * size
    inner = first(values, ("mamba_expand", "expand"), 2) * hidden_of(values)
    if _type(values) in _ALL_RECURRENT:
        inner = first(values, ("intermediate_size",), inner)
    return inner * back * BYTES + inner * memory * size
