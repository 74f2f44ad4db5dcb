"""The cut of configs and tensor names, against a slow and plain oracle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from conftest import ROOT
from cut_strategies import cuts
from sleb_serve.checkpoint.decoder import decoder_path
from sleb_serve.cut.config import Cut, shared_sources
from sleb_serve.cut.keys import BY_LAYER, FIRST_LAYERS, LAYER_LETTERS, LAYER_NUMBERS, PER_LAYER
from sleb_serve.cut.whole import cut_config, explicit, removable
from sleb_serve.errors import SlebError

NESTED: tuple[tuple[str, ...], ...] = (
    (),
    ("text_config",),
    ("thinker_config", "text_config"),
    ("llm_config",),
    ("language_config",),
)


@st.composite
def decoders(draw: st.DrawFn) -> tuple[Cut, dict[str, Any]]:
    """A cut, and a decoder's config of the same number of layers with random entries of each."""
    cut = draw(cuts())
    count = cut.num_blocks
    layers = st.sets(st.integers(0, count - 1)).map(sorted)
    values: dict[str, Any] = {draw(st.sampled_from(["num_hidden_layers", "n_layer"])): count}
    for key in draw(st.sets(st.sampled_from(sorted(PER_LAYER)), max_size=4)):
        # Some list layers for multi-token prediction behind the decoder's.
        more = draw(st.sampled_from([0, 0, 1, 3]))
        values[key] = draw(
            st.lists(st.integers(-5, 5), min_size=count + more, max_size=count + more)
        )
    for key in draw(st.sets(st.sampled_from(sorted(LAYER_NUMBERS - {"mlp_only_layers"})))):
        values[key] = draw(layers)
    for key in draw(st.sets(st.sampled_from(sorted(FIRST_LAYERS)))):
        values[key] = draw(st.integers(0, count + 3))
    if draw(st.booleans()):
        values["moe_layer_start_index"] = draw(st.lists(st.integers(0, count), max_size=2))
        values["moe_layer_end_index"] = draw(st.lists(st.integers(-1, count), max_size=2))
    if draw(st.booleans()):
        values["interleaved_sliding_window"] = draw(st.lists(st.integers(), min_size=1, max_size=4))
    if draw(st.booleans()):
        values["index_topk_freq"] = draw(st.integers(1, 4))
        values["index_skip_topk_offset"] = draw(st.integers(0, 3))
    if draw(st.booleans()):
        numbers = draw(layers)
        values["linear_attn_config"] = {"kda_layers": [i + 1 for i in numbers], "num_heads": 4}
    for key in draw(st.sets(st.sampled_from(sorted(LAYER_LETTERS)))):
        values[key] = "".join(
            draw(st.lists(st.sampled_from("M*-E"), min_size=count, max_size=count))
        )
    for key in draw(st.sets(st.sampled_from(sorted(BY_LAYER)))):
        values[key] = {str(layer): {"head_dim": layer + 1} for layer in draw(layers)}
    if draw(st.booleans()):
        values["decoder_sparse_step"] = draw(st.integers(1, 4))
        values["mlp_only_layers"] = draw(layers)
    values["vocab_size"] = count
    values["eos_token_id"] = [1] * count
    return cut, values


def told(values: dict[str, Any], layer: int) -> dict[str, Any]:
    """All that a decoder's config says of one layer, each thing by its own plain rule."""
    facts: dict[str, Any] = {}
    for key, value in values.items():
        if key in PER_LAYER or key in LAYER_LETTERS:
            facts[key] = value[layer]
        elif key in LAYER_NUMBERS - {"mlp_only_layers"}:
            facts[key] = layer in value
        elif key == "moe_layer_end_index":
            facts[key] = [end < 0 or layer <= end for end in value]
        elif key in FIRST_LAYERS:
            facts[key] = [layer < v for v in (value if isinstance(value, list) else [value])]
        elif key == "interleaved_sliding_window":
            facts[key] = value[layer % len(value)]
        elif key == "linear_attn_config":
            facts[key] = layer + 1 in value["kda_layers"]
        elif key in BY_LAYER:
            facts[key] = value.get(str(layer))
    step, plain = values.get("decoder_sparse_step", 1), values.get("mlp_only_layers", [])
    facts["experts"] = layer not in plain and (layer + 1) % step == 0
    # As vLLM's deepseek_v2.py reads it.
    pattern, period = values.get("index_topk_pattern"), values.get("index_topk_freq", 1)
    after = max(layer - values.get("index_skip_topk_offset", 2) + 1, 0)
    facts["indexer"] = pattern[layer] != "S" if pattern else after % period == 0
    facts.pop("index_topk_pattern", None)
    return facts


@given(decoders(), st.sampled_from(NESTED), st.booleans())
def test_a_cut_config_says_of_each_layer_what_the_dense_one_says(
    drawn: tuple[Cut, dict[str, Any]], path: tuple[str, ...], tower: bool
) -> None:
    cut, values = drawn
    config: dict[str, Any] = values
    for key in reversed(path):
        config = {key: config}
    if tower:
        # As many layers and lists as the decoder's, which are not its.
        config = {
            **config,
            "vision_config": {"num_hidden_layers": cut.num_blocks, "depths": [1] * 9},
        }
    assert decoder_path(config) == path
    ends = [end for end in values.get("moe_layer_end_index", ()) if end >= 0]
    if any(end < cut.kept[0] for end in ends):
        with pytest.raises(SlebError, match="moe_layer_end_index: no layer up to"):
            cut_config(config, cut)
        return
    found = cut_config(config, cut)
    assert found.get("vision_config") == config.get("vision_config")
    inner = found
    for key in path:
        inner = inner[key]
    count = inner.get("num_hidden_layers", inner.get("n_layer"))
    kept = [layer for layer in range(cut.num_blocks) if layer not in cut.removed]
    assert count == len(kept)
    for new, old in enumerate(kept):
        assert told(inner, new) == told(values, old)
    for key in PER_LAYER & values.keys():
        assert inner[key][count:] == values[key][cut.num_blocks :]
    assert inner["vocab_size"] == cut.num_blocks
    assert inner["eos_token_id"] == values["eos_token_id"]
    json.dumps(found)


@given(cuts(), st.integers(1, 14), st.booleans())
def test_shared_keys_and_values_keep_their_source_or_the_cut_is_refused(
    cut: Cut, shared: int, alternate: bool
) -> None:
    count = cut.num_blocks
    types = ["sliding" if alternate and layer % 2 else "full" for layer in range(count)]
    values = {"num_hidden_layers": count, "num_kv_shared_layers": shared, "layer_types": types}

    def sources(values: dict[str, Any]) -> dict[int, int | None]:
        """By layer: the layer whose keys and values it uses."""
        number, types = values["num_hidden_layers"], values["layer_types"]
        first = max(0, number - values["num_kv_shared_layers"])
        found: dict[int, int | None] = {}
        for layer in range(number):
            before = [i for i in range(first) if types[i] == types[layer]]
            found[layer] = layer if layer < first else (before[-1] if before else None)
        return found

    kept = [layer for layer in range(count) if layer not in cut.removed]
    dense = sources(values)
    lost = any(dense[layer] in cut.removed for layer in kept if dense[layer] is not None)
    assume(shared < count)  # or no layer has any of its own: no such model
    if lost:
        with pytest.raises(SlebError, match="holds the keys and values that later blocks use"):
            cut.values(values)
        return
    found = sources(cut.values(values))
    for new, old in enumerate(kept):
        source, place = dense[old], found[new]
        assert (None if source is None else kept.index(source)) == place


def test_blocks_that_others_need_are_not_removable() -> None:
    types = ["sliding_attention", "full_attention"] * 3
    values = {"num_hidden_layers": 6, "num_kv_shared_layers": 2, "layer_types": types}
    assert shared_sources(values, 6) == {2: frozenset({4}), 3: frozenset({5})}
    assert removable(values) == (0, 1, 4, 5)
    # Behind the last block nothing moves.
    assert removable({"num_hidden_layers": 6, "attn_layer_period": 3}) == (5,)
    with pytest.raises(SlebError, match="layers use their own number"):
        removable({"num_hidden_layers": 6, "scale_attn_by_inverse_layer_idx": True})


def test_blocks_that_a_vision_tower_feeds_are_kept() -> None:
    config = {
        "text_config": {"num_hidden_layers": 6},
        "vision_config": {"depth": 6, "deepstack_visual_indexes": [1, 3, 5]},
    }
    assert removable(config) == (3, 4, 5)
    with pytest.raises(SlebError, match=r"block 2 receives the vision tower's features"):
        cut_config(config, Cut(6, (2, 4)))
    for key, value in (
        ("deepstack_layer_map", [3, 0]),
        ("spatial_target_layers", 7),
        ("deepstack_visual_indexes", 4),
    ):
        with pytest.raises(SlebError, match=f"{key} is .*, which does"):
            cut_config({"num_hidden_layers": 6, key: value}, Cut(6, (2,)))
    assert removable({"num_hidden_layers": 5, "deepstack_layer_map": [[3, 0], [7, 2]]}) == (1, 3, 4)


@pytest.mark.parametrize(
    ("values", "removed", "message"),
    [
        ({"moe_layer_freq": 2}, (1, 4), "moe_layer_freq makes every 2th layer"),
        ({"sliding_window_pattern": 6}, (1, 4), "sliding_window_pattern makes every 6th"),
        ({"scale_attn_by_inverse_layer_idx": True}, (1,), "layers use their own number"),
        ({"secret": [1, 2, 3, 4, 5, 6]}, (1,), "secret lists 6 values, probably one per layer"),
        (
            {"per_layer_config": {"all": {}}},
            (1,),
            "per_layer_config is {'all': {}}, which does not",
        ),
        (
            {"moe_layers": [[1], [2]]},
            (1,),
            r"moe_layers is \[\[1\], \[2\]\], which does not describe layers",
        ),
        ({"decoder_sparse_step": 2, "mlp_only_layers": 1}, (1,), "mlp_only_layers is 1, which"),
        (
            {"moe_layers_enum": "1,x"},
            (1,),
            "moe_layers_enum is '1,x', which does not describe layers",
        ),
        ({"moe_layers_enum": "1"}, (1,), "moe_layers_enum: no layer that it names is kept"),
        (
            {"linear_attn_config": {"kda_layers": 3}},
            (1,),
            "linear_attn_config is .*, which does not",
        ),
        ({"moe_layer_freq": 2}, (1, 2), None),  # what stays keeps its remainder
        ({"moe_layer_freq": 1, "secret": [1, 2]}, (1,), None),
    ],
)
def test_what_cannot_be_said_of_fewer_layers_is_refused_by_its_key(
    values: dict[str, Any], removed: tuple[int, ...], message: str | None
) -> None:
    cut = Cut(6, removed)
    config = {"num_hidden_layers": 6, **values}
    if message is None:
        assert cut.values(config)["num_hidden_layers"] == 6 - len(removed)
        return
    with pytest.raises(SlebError, match=message):
        cut.values(config)


def test_layers_are_renumbered_in_strings_and_from_one() -> None:
    values = {
        "num_hidden_layers": 6,
        "moe_layers_enum": "2,3,5",
        "linear_attn_config": {"kda_layers": [1, 2, 4], "full_attn_layers": [3, 6], "width": 4},
    }
    found = Cut(6, (1, 2)).values(values)
    assert found["moe_layers_enum"] == "1,3"
    assert found["linear_attn_config"] == {
        "kda_layers": [1, 2],
        "full_attn_layers": [4],
        "width": 4,
    }


def test_what_depends_on_the_number_of_layers_is_compensated() -> None:
    found = Cut(8, (1, 2, 3, 4, 5, 6)).values({"num_hidden_layers": 8, "scale_depth": 1.4})
    assert found["scale_depth"] / 2**0.5 == pytest.approx(1.4 / 8**0.5)


def test_what_transformers_derives_is_made_explicit() -> None:
    config = {"text_config": {"num_hidden_layers": 3, "moe_layers": [], "layer_types": None}}
    derived = {
        "text_config": {
            "num_hidden_layers": 3,
            "layer_types": ["a", "b", "a"],
            "moe_layers": [1],
            "first_k_dense_replace": 2,
            "hidden_size": 5,
        }
    }
    assert explicit(config, derived) == {
        "text_config": {
            "num_hidden_layers": 3,
            "layer_types": ["a", "b", "a"],
            "moe_layers": [1],
            "first_k_dense_replace": 2,
        }
    }


def test_the_cut_needs_no_torch() -> None:
    modules = "sys, sleb_serve.cut.config, sleb_serve.checkpoint.checkpoint"
    script = f"import {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"] * 4}, "layer_type is .sliding"),
        ({"intermediate_size": 128}, "mlp.intermediate_size is 256 there and 128 here"),
        ({"sliding_window": 8}, "sliding_window is 16 there and 8 here"),
        ({"rms_norm_eps": 1e-2}, "eps is 1e-06 there and 0.01 here"),
        ({"num_hidden_layers": 3}, "has 3 layers where 4 stay"),
    ],
)
def test_a_layer_that_would_not_be_as_it_was_is_refused_by_its_attribute(
    changes: dict[str, Any], message: str
) -> None:
    from sleb_serve.cut.likeness import apply, check_likeness
    from tiny import make_config

    dense, short = make_config("gemma2"), make_config("gemma2")
    cut = Cut(6, (1, 4))
    apply(short, cut)
    assert check_likeness(dense, short, "Gemma2ForCausalLM", cut)
    short.update(changes)
    with pytest.raises(SlebError, match=message):
        check_likeness(dense, short, "Gemma2ForCausalLM", cut)
    assert not check_likeness(dense, short, "NoSuchForCausalLM", cut)


def test_a_layer_that_computes_with_the_number_of_layers_is_refused() -> None:
    from transformers import MiniMaxConfig

    from sleb_serve.cut.likeness import apply, check_likeness
    from tiny import make_config

    values = {**make_config("mixtral").to_dict(), "layer_types": ["linear_attention"] * 6}
    values = {k: v for k, v in values.items() if k not in ("model_type", "architectures")}
    dense, short = (MiniMaxConfig(**values) for _ in range(2))
    cut = Cut(6, (1, 4))
    apply(short, cut)
    with pytest.raises(SlebError, match=r"number of layers|num_hidden_layers"):
        check_likeness(dense, short, "MiniMaxForCausalLM", cut)


def test_a_config_that_is_read_from_a_file_can_be_cut(tmp_path: Path) -> None:
    """Of a model type that neither Transformers nor this package knows."""
    from sleb_serve.checkpoint.checkpoint import Checkpoint
    from sleb_serve.cut.servable import check_servable

    config = {"architectures": ["NewForCausalLM"], "num_hidden_layers": 6, "model_type": "new"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SlebError, match="NewForCausalLM is neither in the support matrix"):
        check_servable(Checkpoint(tmp_path, config), Cut(6, (1,)))
    with pytest.raises(SlebError, match="moe_layer_freq"):
        check_servable(Checkpoint(tmp_path, {**config, "moe_layer_freq": 2}), Cut(6, (1,)))
