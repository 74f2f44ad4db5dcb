"""Exports that need no Transformers; see says_all.py."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from conftest import THOROUGH
from matrix import MODELS
from says_all import architecture_of, measured, says_all
from sleb_serve.compat.architectures import _data, config_says_all, status


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral", "opt", "gpt2", "mamba2"])
def test_a_config_that_says_all_is_listed(name: str) -> None:
    assert says_all(MODELS[name])
    assert config_says_all(architecture_of(MODELS[name]))


@pytest.mark.parametrize("name", ["gemma2", "smollm3", "qwen2_moe", "llama4"])
def test_a_config_that_leaves_something_to_positions_is_not(name: str) -> None:
    assert not says_all(MODELS[name])
    assert not config_says_all(architecture_of(MODELS[name]))


def test_only_what_is_proven_is_listed() -> None:
    assert {status(name)[0] for name in _data()["config_says_all"]} == {"proven"}


@pytest.mark.skipif(not THOROUGH, reason="SLEB_TEST_THOROUGH=1, or make test-all")
def test_the_list_is_what_was_measured() -> None:
    assert measured() == _data()["config_says_all"]
