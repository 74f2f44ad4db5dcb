"""Hold signals back while an interruption would leave a file behind."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def signals_held() -> Iterator[None]:
    """Let Python's signal handlers run only after the block.

    Create a file and note its name in such a block, inside the `try` whose `finally` removes it.
    Masking signals would not do: another thread could take them, and handlers run in this one.
    """
    arrived: list[int] = []
    handlers = {}
    # Only the main thread can set handlers, and only it runs them.
    if threading.current_thread() is threading.main_thread():
        handlers = {n: h for n in _ENDING if callable(h := signal.getsignal(n))}
    for number in handlers:
        signal.signal(number, lambda number, _frame: arrived.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for came in arrived:
            signal.raise_signal(came)
