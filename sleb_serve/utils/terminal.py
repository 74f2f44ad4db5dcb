"""Text for a terminal, which interprets control characters."""

from __future__ import annotations

import re

_LONGEST_WORD, _LONGEST = 300, 1000
"""Maximum characters of an error message; longer ones are truncated."""

_CREDENTIALS = re.compile(r"(https?:/+)\S*@", re.IGNORECASE)


def printable(text: str) -> str:
    """Escape unprintable characters, except line breaks."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def one_line(message: str) -> str:
    """Return a message as one line without passwords in URLs or unprintable characters.

    Messages repeat arguments and file contents, which may be anything. Long words are truncated,
    and so is the whole message, except its end, which gives the next step.
    """
    message = _CREDENTIALS.sub(r"\1***@", message)
    words = (f"{w[:60]}…" if len(w) >= _LONGEST_WORD else w for w in message.split())
    shown = printable(" ".join(words))
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 202]} … {shown[-199:]}"
