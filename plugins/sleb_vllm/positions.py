"""vLLM models that derive a layer's type from its number modulo a period.

GPT-OSS has a sliding window in every second layer, Llama 4 experts in every nth, and both ignore
the config's list. When such a model is built without some layers, a layer has its new number, but
the remainder of its old one.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sleb_serve.cut.config import Cut

MODULES = ("vllm.model_executor.models.gpt_oss", "vllm.model_executor.models.llama4")
_NAME = "extract_layer_index"


class Position(int):
    """A layer's number in the shorter model, with the modulo of the dense model's number."""

    dense: int

    def __new__(cls, new: int, dense: int) -> Position:
        """Create number `new` for the old number `dense`."""
        self = super().__new__(cls, new)
        self.dense = dense
        return self

    def __add__(self, other: int) -> Position:
        return Position(int(self) + other, self.dense + other)

    def __mod__(self, other: int) -> int:
        return self.dense % other


@contextmanager
def dense_remainders(cut: Cut) -> Iterator[None]:
    """Use numbers that remember the dense model's inside the context."""
    modules = [importlib.import_module(name) for name in MODULES]
    stock = [getattr(module, _NAME) for module in modules]
    for module, function in zip(modules, stock, strict=True):
        setattr(module, _NAME, _positioned(function, cut))
    try:
        yield
    finally:
        for module, function in zip(modules, stock, strict=True):
            setattr(module, _NAME, function)


def _positioned(function: Any, cut: Cut) -> Any:
    def extract_layer_index(name: str, *args: Any, **kwargs: Any) -> int:
        number: int = function(name, *args, **kwargs)
        return Position(number, cut.kept[number]) if number < len(cut.kept) else number

    return extract_layer_index
