"""A report in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sleb_bench.tables import sections, title
from sleb_serve.utils.markdown import table


def to_markdown(report: Mapping[str, Any]) -> str:
    """All of a report's tables."""
    lines = [f"# {title(report)}", ""]
    for section in sections(report):
        lines += [f"## {section.title}", ""]
        if section.rows:
            lines += [*table(section.rows), ""]
        for note in section.notes:
            lines += [f"- {note}"]
        lines += [""] if section.notes else []
    return "\n".join(lines)
