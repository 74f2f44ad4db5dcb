"""Short modules and short functions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from conftest import ROOT

PARTS = ("sleb_serve", "plugins", "benchmarks", "tests", "docs", "deploy")
MODULES = sorted(file for part in PARTS for file in (ROOT / part).rglob("*.py"))


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_modules_and_functions_are_short(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, node.name


def test_the_plugin_is_small() -> None:
    files = (ROOT / "plugins").rglob("*.py")
    assert sum(len(file.read_text().splitlines()) for file in files) < 700
