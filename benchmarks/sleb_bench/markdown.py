"""A report in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sleb_bench.tables import Section, sections, title
from sleb_serve.utils.markdown import table


def to_markdown(report: Mapping[str, Any]) -> str:
    """Format all tables of a report."""
    return markdown(title(report), sections(report))


def markdown(heading: str, content: Sequence[Section]) -> str:
    """Format sections under a heading."""
    lines = [f"# {heading}", ""]
    for section in content:
        lines += [f"## {section.title}", ""]
        if section.rows:
            lines += [*table(section.rows), ""]
        for note in section.notes:
            lines += [f"- {note}"]
        lines += [""] if section.notes else []
    return "\n".join(lines)
