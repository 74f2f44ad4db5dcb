"""Evaluations for tests: the command, its text, and available data sets."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from sleb_serve.cli.main import main

_SHARED = ROOT.parent / "shared" / "hf" / "datasets"
HAS_DATA = _SHARED.is_dir() or "HF_DATASETS_CACHE" in os.environ
needs_data = pytest.mark.skipif(
    not HAS_DATA, reason="needs the data sets; HF_DATASETS_CACHE says where they are"
)


SOME_TEXT = (
    *("--perplexity", "python-docs", "--sequence-length", "32", "--sequences", "2"),
    "--no-answers",
)
"""Options of an evaluation of a moment."""


def use_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let data sets be found where they are."""
    if _SHARED.is_dir():
        monkeypatch.setenv("HF_DATASETS_CACHE", os.environ.get("HF_DATASETS_CACHE", str(_SHARED)))
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", os.environ["HF_DATASETS_CACHE"])


def short_text(folder: Path) -> Path:
    file = folder / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog, and nobody minds. " * 12)
    return file


def evaluated(path: Path, output: Path, *options: str, answers: bool = False) -> dict[str, Any]:
    arguments = ["eval", str(path), "-o", str(output), "--dtype", "float32", *options]
    assert main(arguments if answers else [*arguments, "--no-answers"]) == 0
    report: dict[str, Any] = json.loads(output.read_text())
    return report
