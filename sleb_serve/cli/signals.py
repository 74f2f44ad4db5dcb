"""Signals that end a command like an error does, so that no file stays half-written."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_ENDING: dict[signal.Signals, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}
_AGAIN_AFTER = 0.2  # seconds


class StoppedError(BaseException):
    """A signal that ends this process; not an `Exception`, so that no library catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number


class _Stop:
    """A signal handler that raises, and raises again if something swallowed the exception.

    Python drops exceptions that leave a destructor or a callback of C code, and a signal can
    arrive in one. A thread therefore repeats the signal until the command has ended. A repeated
    one is ignored while the first one's exception is handled, so that it interrupts no clean-up.
    """

    def __init__(self) -> None:
        self.stopping = False
        self._repeated = False
        self._ended = threading.Event()
        self._repeating: threading.Thread | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        repeated, self._repeated = self._repeated, False
        if repeated and _is_handled():
            return
        if not self.stopping:
            self.stopping = True
            self._repeating = threading.Thread(target=self._repeat, args=[number], daemon=True)
            self._repeating.start()
        raise KeyboardInterrupt if number == signal.SIGINT else StoppedError(number)

    def _repeat(self, number: int) -> None:
        main = threading.main_thread().ident
        assert main is not None
        while not self._ended.wait(_AGAIN_AFTER):
            self._repeated = True
            # Sent to the main thread, the signal also wakes it from a wait.
            signal.pthread_kill(main, number)

    def end(self) -> None:
        """Repeat the signal no more."""
        self._ended.set()
        if self._repeating is not None:
            self._repeating.join()


def _is_handled() -> bool:
    """Tell whether the exception of a signal is being handled where the signal arrived."""
    error = sys.exception()
    while error is not None and not isinstance(error, StoppedError | KeyboardInterrupt):
        error = error.__context__
    return error is not None


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise `StoppedError` for signals that would end the process, `KeyboardInterrupt` for SIGINT.

    Ignored signals stay ignored.
    """
    # Only the main thread can handle signals.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stop = _Stop()
    report = sys.unraisablehook

    def report_unless_stopping(unraisable: sys.UnraisableHookArgs) -> None:
        # Destructors of objects that the signal left half-made complain; nobody can act on it.
        if not stop.stopping:
            report(unraisable)

    ending = [n for n, default in _ENDING.items() if signal.getsignal(n) is default]
    for number in ending:
        signal.signal(number, stop)
    sys.unraisablehook = report_unless_stopping
    try:
        yield
    finally:
        stop.end()
        for number in ending:
            signal.signal(number, _ENDING[number])
        # Such objects may outlive the command: after a stop the hook stays.
        if not stop.stopping:
            sys.unraisablehook = report
