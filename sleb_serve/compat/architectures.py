"""Support data of architectures, and its output formats.

*Proven*: prompt log-probabilities and a greedy continuation of a tiny random model, pruned in vLLM,
equal those of Transformers with the blocks skipped. *Expected*: the same mechanism, not proven.
*Refused*: the model cannot be described with fewer layers.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from sleb_serve.errors import SlebError
from sleb_serve.utils.extras import COMPARES, install_hint, missing

UNLISTED = "it is not in the support matrix of this release"


@functools.cache
def _data() -> Mapping[str, Any]:
    text = files("sleb_serve.compat").joinpath("architectures.json").read_text(encoding="utf-8")
    return MappingProxyType(json.loads(text))


def made() -> tuple[str, Mapping[str, str]]:
    """Return the date of the matrix and the versions it was measured with."""
    return _data()["date"], _data()["versions"]


def status(architecture: str) -> tuple[str, str]:
    """Return an architecture's status (``proven``, ``expected`` or ``refused``) and the reason."""
    found = support().get(architecture)
    if found is None:
        return "expected", UNLISTED
    return found["status"], found.get("reason", "")


def why_refused(architecture: str) -> str:
    """Return the message for a refused architecture."""
    return (
        f"{architecture} cannot be served pruned: {status(architecture)[1]}; `sleb-serve "
        f"architectures` lists those that can"
    )


def check_supported(architecture: str) -> None:
    """Refuse an architecture with the status ``refused``.

    Raises:
        SlebError: gives the reason.
    """
    if status(architecture)[0] == "refused":
        raise SlebError(why_refused(architecture))


def check_known(architecture: str) -> None:
    """Refuse an architecture that was neither tested for this release nor compared on this machine.

    Raises:
        SlebError: it is not listed.
    """
    if status(architecture)[1] != UNLISTED:
        return
    lacks = missing(*COMPARES)
    if lacks is not None:
        raise SlebError(
            f"{architecture} is not in the support matrix of this release, and without {lacks} its "
            f"layers cannot be compared here; {install_hint(lacks)}, or serve the dense model"
        )
    raise SlebError(
        f"{architecture} is neither in the support matrix of this release nor known to the "
        "Transformers installed here, so removing its layers is untested; upgrade transformers or "
        "sleb-serve, or serve the dense model"
    )


def config_says_all(architecture: str) -> bool:
    """Return whether config.json describes layers completely, without deriving types by position.

    Measured with Transformers, which derives nothing from a layer's number for these architectures,
    so the shorter config can be written without it. See tests/says_all.py.
    """
    return architecture in _data()["config_says_all"]


@functools.cache
def support() -> dict[str, dict[str, str]]:
    """Return ``status`` and, unless proven, ``reason`` by architecture."""
    data = _data()
    found: dict[str, dict[str, str]] = {name: {"status": "proven"} for name in data["proven"]}
    for kind in ("expected", "refused"):
        for reason, names in data[kind].items():
            found |= {name: {"status": kind, "reason": reason} for name in names}
    return dict(sorted(found.items()))


def support_text() -> str:
    """Return the support matrix with a line per architecture."""
    rows = support()
    width = max(map(len, rows))
    return "\n".join(
        f"{name:{width}}  {row['status']:8}  {row.get('reason', '')}".rstrip()
        for name, row in rows.items()
    )


def support_markdown() -> str:
    """Return the support matrix as a Markdown table with a row per status and reason."""
    data = _data()
    lines = ["| | why | architectures (…ForCausalLM unless given in full) |", "|---|---|---|"]
    groups = [("proven", "equal to Transformers with the blocks skipped", data["proven"])]
    groups += [
        (kind, why, names) for kind in ("expected", "refused") for why, names in data[kind].items()
    ]
    for kind, reason, names in groups:
        short = ", ".join(name.removesuffix("ForCausalLM") for name in names)
        lines.append(f"| {kind} | {reason} | {short} |")
    return "\n".join(lines)
