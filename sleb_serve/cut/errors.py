"""Errors for impossible cuts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sleb_serve.errors import SlebError
from sleb_serve.utils.strict_json import short

INSTEAD = "remove other blocks, or serve the dense model"
"""Next step after a refused cut: the end of an error message."""


@contextmanager
def read_as_layers(key: str, value: Any) -> Iterator[None]:
    """Refuse values of an unexpected form inside the context."""
    try:
        yield
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise SlebError(
            f"{key} is {short(value)}, which does not describe layers; correct the config"
        ) from error
