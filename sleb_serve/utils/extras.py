"""Packages that not every command needs, and the extras of sleb-serve that install them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from types import MappingProxyType

from sleb_serve.errors import SlebError

EXTRAS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "accelerate": ("select",),
        "datasets": ("select",),
        "fastapi": ("cuda", "cpu"),
        "gguf": ("bench",),
        "lm_eval": ("eval",),
        "matplotlib": ("bench", "eval"),
        "openai": ("bench",),
        "prometheus_client": ("select", "bench"),
        "psutil": ("select", "bench"),
        "pyarrow": ("select",),
        "safetensors": ("select",),
        "torch": ("select",),
        "transformers": ("select",),
        "vllm": ("cuda", "cpu"),
    }
)
"""The extras that bring a module; the first is named first to those who lack it."""

COMPARES = ("transformers", "torch")
"""What compares the layers of the shorter model with the dense one's."""


class MissingExtraError(SlebError):
    """A package is not installed that only some commands need."""


def missing(*modules: str) -> str | None:
    """The first of some modules that is not installed, without importing them; None if all are."""
    return next((module for module in modules if find_spec(module) is None), None)


def install_hint(module: str) -> str:
    """The command that installs a module's package; with several extras, any of them."""
    return " or ".join(f"pip install 'sleb-serve[{extra}]'" for extra in EXTRAS[module])


def missing_extra(error: ImportError, what: str) -> MissingExtraError | None:
    """The error for people where an import failed because an extra is not installed.

    Args:
        error: what the import raised.
        what: the command or function that needs the module.

    Returns:
        None where the module is not of an extra, or is installed and fails by itself.
    """
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS or missing(module) is None:
        return None
    return MissingExtraError(f"{what} needs {module}: {install_hint(module)}")
