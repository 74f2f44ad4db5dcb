"""The C library's heap."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any


def trim_heap(device: Any) -> None:
    """Return the heap's free pages to the system, if `device`'s tensors lie in glibc's heap.

    glibc puts small objects into the room that freed tensors leave. The next tensors do not fit
    there, so the heap grows to several times what is in use.
    """
    if device.type == "cpu":
        with contextlib.suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).malloc_trim(0)
