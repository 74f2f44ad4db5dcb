"""The end of a process whose engine has stopped."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import signal
import sys
import threading
from typing import Any

_GRACE_SECONDS = 10.0
"""For open connections, once the engine has stopped."""


class Ending:
    """Sees to it that a server that stops does end, and says whether its engine had died.

    vLLM ends with 0 either way, so whoever restarts servers by their exit code would leave it down;
    and it may wait for ever for streams whose engine is gone, with the clients waiting, too.
    """

    def __init__(self, engine_client: Any) -> None:
        self._client, self._shutdown = engine_client, engine_client.shutdown
        self._died: bool | None = None
        engine_client.shutdown = self.shutdown
        atexit.register(self._at_exit)

    def shutdown(self, *args: Any, **kwargs: Any) -> Any:
        """The engine client's own, noting what was before."""
        if self._died is None:
            # Once it has been shut down, it counts as errored.
            self._died = bool(self._client.errored)
            drain = kwargs.get("timeout") or 0
            timer = threading.Timer(drain + _GRACE_SECONDS, self._end)
            timer.daemon = True
            timer.start()
        return self._shutdown(*args, **kwargs)

    def _at_exit(self) -> None:
        if self._died:
            self._end()

    def _end(self) -> None:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(bool(self._died)))


@functools.cache
def keep_signals_apart() -> None:
    """From now on, forks of this process keep their signals to themselves.

    Before Python 3.12, a fork also writes each signal that it gets to the event loop of its parent
    (https://github.com/python/cpython/issues/66285). Where vLLM forks its workers, the server took
    the SIGTERM to a worker, sent because another one had died, for its own, and ended with 0.
    """
    os.register_at_fork(after_in_child=functools.partial(signal.set_wakeup_fd, -1))
