"""Stand-ins for vLLM's functions while one model is built or loaded, and never longer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(
    name: str, original: Callable[..., Any], stand_in: Callable[..., Any]
) -> Iterator[None]:
    """While this is open, every module that holds `original` by this name holds `stand_in`.

    Modules import functions by name, so that replacing one in its own module reaches few. A module
    that is imported meanwhile gets the original back with the rest.
    """
    _swap(name, original, stand_in)
    try:
        yield
    finally:
        _swap(name, stand_in, original)


def _swap(name: str, old: Callable[..., Any], new: Callable[..., Any]) -> None:
    for module in list(sys.modules.values()):
        # Through __dict__: getattr on a lazy module would import what it stands for.
        if getattr(module, "__dict__", {}).get(name) is old:
            module.__dict__[name] = new
