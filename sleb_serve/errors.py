"""The exception for user-facing errors."""

from __future__ import annotations


class SlebError(Exception):
    """A user-facing error: the problem, its cause and the next step, in one line.

    The command line prints the message to standard error and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def first_line(error: BaseException) -> str:
    """Return the first line of another library's exception, for use in our own message."""
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
