"""Which architectures can be served pruned: data, and how people and machines read it.

*Proven*: prompt log-probabilities and a greedy continuation of a tiny random model, pruned in vLLM,
equal Transformers' with the blocks skipped. *Expected*: the same mechanism, not proven. *Refused*:
the model cannot be said with fewer layers.
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
    """The date of the matrix, and the versions it was made with."""
    return _data()["date"], _data()["versions"]


def status(architecture: str) -> tuple[str, str]:
    """What is known of an architecture: ``proven``, ``expected`` or ``refused``, and why."""
    found = support().get(architecture)
    if found is None:
        return "expected", UNLISTED
    return found["status"], found.get("reason", "")


def why_refused(architecture: str) -> str:
    """Why an architecture of the refused ones is not served pruned, as a message."""
    return (
        f"{architecture} cannot be served pruned: {status(architecture)[1]}; `sleb-serve "
        f"architectures` lists those that can"
    )


def check_supported(architecture: str) -> None:
    """Refuse an architecture of the refused ones.

    Raises:
        SlebError: saying why.
    """
    if status(architecture)[0] == "refused":
        raise SlebError(why_refused(architecture))


def check_known(architecture: str) -> None:
    """Refuse an architecture that was neither tried for this release nor compared on this machine.

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
        f"Transformers installed here, so nothing shows that its layers keep what they "
        f"compute; upgrade transformers or sleb-serve, or serve the dense model"
    )


def config_says_all(architecture: str) -> bool:
    """Whether config.json says of each layer whatever its position alone does not change.

    Measured with Transformers, which derives nothing of these by a layer's number: so the shorter
    model's config can be written without it. See tests/says_all.py.
    """
    return architecture in _data()["config_says_all"]


@functools.cache
def support() -> dict[str, dict[str, str]]:
    """Per architecture: ``status`` (proven, expected, refused) and, unless proven, ``reason``."""
    data = _data()
    found: dict[str, dict[str, str]] = {name: {"status": "proven"} for name in data["proven"]}
    for kind in ("expected", "refused"):
        for reason, names in data[kind].items():
            found |= {name: {"status": kind, "reason": reason} for name in names}
    return dict(sorted(found.items()))


def support_text() -> str:
    """The support matrix, a line per architecture."""
    rows = support()
    width = max(map(len, rows))
    return "\n".join(
        f"{name:{width}}  {row['status']:8}  {row.get('reason', '')}".rstrip()
        for name, row in rows.items()
    )


def support_markdown() -> str:
    """The support matrix as a table of a row per status and reason."""
    data = _data()
    lines = ["| | why | architectures (…ForCausalLM, if no more is said) |", "|---|---|---|"]
    groups = [("proven", "equal to Transformers with the blocks skipped", data["proven"])]
    groups += [
        (kind, why, names) for kind in ("expected", "refused") for why, names in data[kind].items()
    ]
    for kind, reason, names in groups:
        short = ", ".join(name.removesuffix("ForCausalLM") for name in names)
        lines.append(f"| {kind} | {reason} | {short} |")
    return "\n".join(lines)
