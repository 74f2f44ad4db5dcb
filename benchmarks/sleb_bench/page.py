"""A report as one self-contained page with tables and plots."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sleb_bench.tables import Row, Section, sections, title

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid; } tr + tr td { border-top: 1px solid #8884; }
th.text, td.text { text-align: left; }
img { max-width: 100%; background: #fff; border-radius: 6px; margin-top: 1rem; }
ul { color: color-mix(in srgb, currentColor 75%, transparent); padding-left: 1.2rem; }
.broken { border-left: 4px solid #c33; padding-left: 1rem; }
"""


def to_html(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Return the page; `pictures` are PNG by name."""
    return page(title(report), sections(report), pictures)


def page(title: str, content: Sequence[Section], pictures: Mapping[str, bytes]) -> str:
    """Format sections under a heading; `pictures` are PNG by name."""
    heading = escape(title)
    body = [f"<h1>{heading}</h1>"]
    for section in content:
        broken = ' class="broken"' if section.title == "Broken off" else ""
        body.append(f"<section{broken}><h2>{escape(section.title)}</h2>")
        if section.rows:
            body.append(_table(section.rows))
        if section.notes:
            notes = "".join(f"<li>{_with_code(note)}</li>" for note in section.notes)
            body.append(f"<ul>{notes}</ul>")
        if section.picture is not None and section.picture in pictures:
            data = base64.b64encode(pictures[section.picture]).decode()
            body.append(f'<img alt="{section.picture}" src="data:image/png;base64,{data}">')
        body.append("</section>")
    # The empty icon keeps browsers from requesting one.
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<title>{heading}</title><link rel="icon" href="data:,"><style>{_STYLE}</style>'
    )
    inside = "\n".join(body)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{inside}\n'
        f"</body></html>\n"
    )


def _with_code(note: str) -> str:
    """Mark what Markdown has in backticks."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(note))


def _table(rows: Sequence[Row]) -> str:
    text = [all(not _is_number(row[i]) for row in rows[1:]) for i in range(len(rows[0]))]

    def line(row: Row, tag: str) -> str:
        cells = [
            f"<{tag}{' class=text' if is_text else ''}>{escape(cell)}</{tag}>"
            for cell, is_text in zip(row, text, strict=True)
        ]
        return f"<tr>{''.join(cells)}</tr>"

    lines = [line(rows[0], "th"), *(line(row, "td") for row in rows[1:])]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _is_number(cell: str) -> bool:
    return cell[:1].isdecimal() and "requests/s" not in cell and "in flight" not in cell
