"""Accepted vLLM versions, and a guard that names changed symbols of vLLM."""

from __future__ import annotations

import ast
import importlib
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from conftest import ROOT
from sleb_serve.compat import vllm_versions
from sleb_serve.compat.vllm_versions import check_version, fingerprints, ledger, vllm_version
from sleb_serve.errors import SlebError
from sleb_serve.serving.command import check_plugin

SYMBOLS = sorted(ledger()["symbols"])
PLUGIN = sorted((ROOT / "plugins" / "sleb_vllm").glob("*.py"))


@pytest.fixture(autouse=True)
def no_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(vllm_versions.ALLOW, raising=False)


@pytest.fixture(scope="module")
def package() -> Path:
    """The folder of the vLLM that is installed."""
    pytest.importorskip("vllm")
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


@pytest.fixture
def copied(package: Path, tmp_path: Path) -> Path:
    """A copy of the files of vLLM that the plugin relies on."""
    for symbol in SYMBOLS:
        file = symbol.partition(":")[0]
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(package / file, tmp_path / file)
    return tmp_path


@pytest.mark.parametrize("version", ["0.27.0", "0.32.0", "0.32.0+cpu", "0.32.1rc1"])
def test_tested_versions_are_taken(version: str) -> None:
    check_version(version, Path("nowhere"))


@pytest.mark.parametrize("version", ["0.26.0", "0.33.0", "1.0.0", "0.3.0", "dev", None])
def test_other_versions_are_taken_only_if_nothing_changed_that_matters(
    version: str | None, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_version(version, copied)
    file = copied / "transformers_utils" / "config.py"
    text = file.read_text()
    file.write_text(text.replace("config.update(hf_overrides_kw)", "pass  # later"))
    with pytest.raises(SlebError, match=r"untested .*config\.py:get_config is not as in 0\.27"):
        check_version(version, copied)
    file.write_text(
        text.replace(
            "config.update(hf_overrides_kw)", "config.update(hf_overrides_kw)  # as before"
        )
    )
    check_version(version, copied)
    file.unlink()
    with pytest.raises(SlebError, match="SLEB_ALLOW_UNTESTED_VLLM=1"):
        check_version(version, copied)
    monkeypatch.setenv(vllm_versions.ALLOW, "1")
    check_version(version, copied)


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_a_symbol_that_the_plugin_relies_on_is_as_in_a_tested_version(
    symbol: str, package: Path
) -> None:
    """If this fails, look at what changed there, then record it (tests/vllm_fingerprints.py)."""
    known = {tested[symbol] for tested in ledger()["fingerprints"].values()}
    assert fingerprints(package)[symbol] in known, f"vLLM's {symbol} has changed"


def imported() -> set[tuple[str, str]]:
    """Modules of vLLM and the names that the plugin imports from them."""
    found = set()
    for file in PLUGIN:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm"):
                found |= {(str(node.module), alias.name) for alias in node.names}
    return found


@pytest.mark.parametrize(("module", "name"), sorted(imported()), ids=".".join)
def test_a_name_that_the_plugin_imports_is_there(module: str, name: str) -> None:
    pytest.importorskip("vllm")
    found = importlib.import_module(module)
    if not hasattr(found, name):
        importlib.import_module(f"{module}.{name}")


def test_the_plugin_uses_no_private_name_but_those_in_its_ledger() -> None:
    private = set()
    for file in PLUGIN:
        tree = ast.parse(file.read_text())
        own = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and node.attr.startswith("_")
                and not node.attr.startswith("__")
                and not (isinstance(node.value, ast.Name) and node.value.id == "self")
                and node.attr not in own
            ):
                private.add(node.attr)
    private |= {name for _, name in imported() if name.startswith("_")}
    touched = " ".join(ledger()["touched"])
    assert not {name for name in private if name not in touched}
    assert len(ledger()["touched"]) <= 5


def test_the_plugin_is_small() -> None:
    assert sum(len(file.read_text().splitlines()) for file in PLUGIN) < 700


def test_the_command_line_refuses_an_untested_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("vllm")
    check_plugin()
    monkeypatch.setattr("sleb_serve.serving.command.vllm_version", lambda: "0.99.0")
    check_plugin()  # its source is that of a tested one
    monkeypatch.setattr(vllm_versions, "fingerprints", lambda root: dict.fromkeys(SYMBOLS, ""))
    with pytest.raises(SlebError, match=r"vLLM 0\.99\.0 is untested"):
        check_plugin()


def test_the_version_is_the_installed_packages() -> None:
    vllm = pytest.importorskip("vllm")
    assert vllm_version() == vllm.__version__
