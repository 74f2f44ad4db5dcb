"""Names after a cut: tensors, and modules in quantisation configs."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cut_strategies import cuts
from sleb_serve.checkpoint.decoder import TOWERS, decoder_prefix
from sleb_serve.cut.config import Cut
from sleb_serve.cut.quantisation import Names, renumbered
from sleb_serve.errors import SlebError

PREFIXES = ("model.layers.", "model.language_model.layers.", "h.", "transformer.h.", "layers.")


@given(cuts(), st.sampled_from(PREFIXES), st.integers(0, 2), st.sampled_from(sorted(TOWERS)))
def test_only_the_decoders_tensors_are_renumbered(
    cut: Cut, prefix: str, extra: int, tower: str
) -> None:
    """A tower of as many layers, a projector's numbers and experts' keep theirs."""
    count = cut.num_blocks
    inside = [
        f"{prefix}{layer}.mlp.experts.{e}.w" for layer in range(count + extra) for e in (0, 7)
    ]
    outside = [f"{tower}.blocks.{layer}.norm.weight" for layer in range(count)]
    outside += [f"model.{tower}.merger.mlp.2.weight", "model.embed_tokens.weight", "lm_head.weight"]
    assert decoder_prefix([*outside, *inside], count) == prefix
    kept = [layer for layer in range(count) if layer not in cut.removed]
    # Layers behind the last are for multi-token prediction and follow the last that stays.
    places = [*kept, *range(count, count + extra)]
    expected = {
        f"{prefix}{old}.mlp.experts.{e}.w": f"{prefix}{new}.mlp.experts.{e}.w"
        for new, old in enumerate(places)
        for e in (0, 7)
    }
    assert {n: cut.name(n, prefix) for n in inside if cut.name(n, prefix)} == expected
    assert all(cut.name(name, prefix) == name for name in outside)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([f"model.layers.{i}.w" for i in range(6)], "has weights of 6, under model.layers"),
        (["model.embed.weight"], "has weights of none"),
        (
            [f"{part}.layers.{i}.w" for part in ("one", "two") for i in range(8)],
            "2 lists of 8 layers",
        ),
        (
            [f"model.layers.{i}.w" for i in range(6)] + [f"visual.blocks.{i}.w" for i in range(8)],
            "has weights of 6, under model.layers",
        ),
    ],
)
def test_weights_of_another_number_of_layers_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(SlebError, match=message):
        decoder_prefix(names, 8)


PARTS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "mlp.experts.3.up_proj")


def quantised(cut: Cut) -> Names:
    modules = {f"model.layers.{i}.{part}" for i in range(cut.num_blocks) for part in PARTS}
    modules |= {"lm_head", "visual.layers.1.mlp.down_proj"}
    return Names(frozenset(modules), cut, "model.layers.")


@st.composite
def patterns(draw: st.DrawFn) -> str:
    layer = draw(st.integers(0, 13))
    part = draw(st.sampled_from(PARTS))
    return draw(
        st.sampled_from(
            [
                f"model.layers.{layer}.{part}",
                rf"re:.*layers\.{layer}\..*",
                rf"re:model\.layers\.{layer}\.mlp.*",
                rf"re:.*layers\.({layer}|{layer + 1})\.self_attn.*",
                rf"re:.*layers\.[{layer % 10}-9]\..*",
                r"re:.*self_attn\..*",
                f"model.layers.{layer}.self_attn*",
                f"*layers.{layer % 10}*down_proj",
                "lm_head",
                "re:visual.*",
                "visual.layers.1.mlp.down_proj",
            ]
        )
    )


def matches(pattern: str, name: str) -> bool:
    """As compressed-tensors and ModelOpt do."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return fnmatchcase(name, pattern)


@given(cuts(), st.lists(patterns(), max_size=5))
def test_a_quantisations_list_names_the_same_modules_under_their_new_numbers(
    cut: Cut, ignore: list[str]
) -> None:
    names = quantised(cut)
    found = renumbered({"ignore": ignore, "other": {"targets": ["Linear"]}}, names)
    assert found["other"] == {"targets": ["Linear"]}
    for old in names.modules:
        new = names.rename(old)
        if new is not None:
            before = any(matches(pattern, old) for pattern in ignore)
            assert any(matches(pattern, new) for pattern in found["ignore"]) == before, (old, new)


@given(cuts(), st.dictionaries(st.integers(0, 13), st.sampled_from([2, 4, 8]), max_size=4))
def test_gptqmodels_dynamic_rules_hold_for_the_same_modules(cut: Cut, bits: dict[int, int]) -> None:
    """Rules are tried in order; ``-:`` leaves a module out."""
    names = quantised(cut)
    rules = {rf"+:model\.layers\.{layer}\.mlp.*": {"bits": b} for layer, b in bits.items()}
    rules[r"-:.*\.layers\.1\..*q_proj.*"] = {}

    def rule(rules: dict[str, Any], name: str) -> Any:
        for pattern, value in rules.items():
            if re.match(pattern.removeprefix("+:").removeprefix("-:"), name):
                return value if pattern[0] == "+" else False
        return None

    found = renumbered({"dynamic": rules}, names)["dynamic"]
    for old, new in names.forms[0]:
        assert new is None or rule(found, new) == rule(rules, old)


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        (r"re:.*layers\.3\.mlp$", "model.layers.{}.mlp"),
        (r"re:.*layers\.3\.self_attn\.qkv_proj", "model.layers.{}.self_attn.qkv_proj"),
        (
            r"re:language_model\.model\.layers\.3\.mlp\.down_proj",
            "language_model.model.layers.{}.mlp.down_proj",
        ),
        (
            "*language_model.layers.3.self_attn*q_proj",
            "model.language_model.layers.{}.self_attn.q_proj",
        ),
        (r"re:layers\.3\.self_attn\.k_proj", "layers.{}.self_attn.k_proj"),
    ],
)
def test_a_pattern_for_names_that_the_checkpoint_has_not_is_renumbered(
    pattern: str, named: str
) -> None:
    (*found,) = renumbered({"ignore": [pattern]}, quantised(Cut(6, (1, 2))))["ignore"]
    for layer in range(4):
        hit = any(matches(one, named.format(layer)) for one in found)
        assert hit == (layer == 1), (found, layer)


def test_a_pattern_that_names_layers_and_matches_nothing_is_refused() -> None:
    names = quantised(Cut(6, (1, 2)))
    with pytest.raises(SlebError, match="matches no module of the checkpoint"):
        renumbered({"ignore": [r"re:.*layers\.3\.mixer"]}, names)
    unmoved = {"ignore": [r"re:.*layers\.\d+\.mixer", "re:.*layers.[0-9]+.mixer", "re:vision.*"]}
    assert renumbered(unmoved, names) == unmoved


def test_layers_in_strings_are_renumbered() -> None:
    names = quantised(Cut(6, (1, 2)))
    given = {"version": "0.9+(cpu", "blocks": "model.layers.1,model.layers.5", "bits": "int4"}
    assert renumbered(given, names) == {**given, "blocks": "model.layers.3"}


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(SlebError, match="which is not a regular expression"):
        renumbered({"ignore": ["re:layers.(3"]}, quantised(Cut(4, (1,))))
