"""Which architectures can be served pruned: for people, documents and machines."""

from __future__ import annotations

from sleb_vllm.architectures import EXPECTED, PROVEN, REFUSED


def support() -> dict[str, dict[str, str]]:
    """Per architecture: ``status`` (proven, expected, refused) and, unless proven, ``reason``."""
    found = {name: {"status": "proven"} for name in PROVEN}
    for status, reasons in (("expected", EXPECTED), ("refused", REFUSED)):
        found |= {name: {"status": status, "reason": why} for name, why in reasons.items()}
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
    groups: dict[tuple[str, str], list[str]] = {}
    for name, row in support().items():
        group = (row["status"], row.get("reason", "held against Transformers, blocks deleted"))
        groups.setdefault(group, []).append(name.removesuffix("ForCausalLM"))
    order = ("proven", "expected", "refused")
    lines = ["| | why | architectures (…ForCausalLM) |", "|---|---|---|"]
    for (status, reason), names in sorted(groups.items(), key=lambda g: order.index(g[0][0])):
        lines.append(f"| {status} | {reason} | {', '.join(names)} |")
    return "\n".join(lines)
