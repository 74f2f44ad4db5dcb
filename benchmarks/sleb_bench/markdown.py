"""A report in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sleb_bench.tables import sections, title


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


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table whose columns line up in the source, too."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return [lines[0], rule, *lines[1:]]
