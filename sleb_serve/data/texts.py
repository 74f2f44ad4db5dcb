"""Named texts: those on the hub, and the embedded one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DEFAULT_ROWS = 128
"""Rows of wikitext2 and C4 that the official code uses (``nsamples``)."""


@dataclass(frozen=True)
class HubText:
    """A data set on the hub: its text column, and the official code's row separator.

    https://github.com/jiwonsong-dev/SLEB, utils/data_utils.py
    """

    arguments: tuple[tuple[str, Any], ...]
    split: str
    separator: str
    rows: int | None = None


HUB_TEXTS = {
    "wikitext2": HubText(
        (("path", "Salesforce/wikitext"), ("name", "wikitext-2-raw-v1")), "train", "\n\n"
    ),
    "c4": HubText(
        (
            ("path", "allenai/c4"),
            ("data_files", {"train": "en/c4-train.00000-of-01024.json.gz"}),
        ),
        "train",
        " ",
    ),
}


JUDGED_TEXTS = {
    "wikitext2": HubText(
        (("path", "Salesforce/wikitext"), ("name", "wikitext-2-raw-v1")), "test", "\n\n"
    ),
    "c4": HubText(
        (
            ("path", "allenai/c4"),
            ("data_files", {"validation": "en/c4-validation.00000-of-00008.json.gz"}),
        ),
        "validation",
        " ",
        rows=1100,
    ),
}
"""Evaluation texts of the official code."""


EMBEDDED = "python-docs"
"""Python's own help topics: 0.7 MB of English that comes with Python."""


def embedded_text() -> str:
    """Return Python's help topics, 0.7 MB of English that comes with Python."""
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))
