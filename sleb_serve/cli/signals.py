"""Signals that end a command like an error does, so that no file stays half-written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ENDING = (signal.SIGTERM, signal.SIGHUP)


class StoppedError(BaseException):
    """A signal that ends this process; not an `Exception`, so that no library catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise `StoppedError` for signals that would end the process; ignored ones stay ignored."""

    def stop(number: int, _frame: Any) -> None:
        raise StoppedError(number)

    # Only the main thread can handle signals.
    here = threading.current_thread() is threading.main_thread()
    ending = [n for n in _ENDING if here and signal.getsignal(n) is signal.SIG_DFL]
    for number in ending:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ending:
            signal.signal(number, signal.SIG_DFL)
