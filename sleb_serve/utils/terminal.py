"""Text for a terminal, which takes control characters for commands."""

from __future__ import annotations

import re

_LONGEST_WORD, _LONGEST = 300, 1000
"""Characters; what of an error message is longer is cut short."""

_CREDENTIALS = re.compile(r"(https?:/+)\S*@", re.IGNORECASE)


def printable(text: str) -> str:
    """Lines as they are, but for what is not printable, which is escaped."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def one_line(message: str) -> str:
    """A message in one line, without passwords of addresses or unprintable characters.

    Messages repeat arguments and what stands in files, which may be anything. Long words are cut
    short; so is the whole, but for its end, which says what to do.
    """
    message = _CREDENTIALS.sub(r"\1***@", message)
    words = (f"{w[:60]}…" if len(w) >= _LONGEST_WORD else w for w in message.split())
    shown = printable(" ".join(words))
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 202]} … {shown[-199:]}"
