"""How a cut that cannot be made is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sleb_serve.errors import SlebError
from sleb_serve.utils.strict_json import short

INSTEAD = "remove other blocks, or serve the dense model"
"""What a refused cut leaves to do: the end of an error."""


@contextmanager
def read_as_layers(key: str, value: Any) -> Iterator[None]:
    """While open, a value that turns out not to be of the form that its key has is refused."""
    try:
        yield
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise SlebError(
            f"{key} is {short(value)}, which does not describe layers; correct the config"
        ) from error
