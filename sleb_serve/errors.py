"""The one exception that users are meant to read."""

from __future__ import annotations


class SlebError(Exception):
    """A mistake in what was asked for: what is wrong, why, and the next step, in one line.

    The command line prints the message to standard error and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def first_line(error: BaseException) -> str:
    """What another library's exception says first, for use inside a message of our own."""
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
