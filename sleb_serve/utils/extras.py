"""Optional packages, and the extras of sleb-serve that install them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
        "numpy": ("bench",),
        "openai": ("bench",),
        "peft": ("heal",),
        "prometheus_client": ("select", "bench"),
        "psutil": ("select", "bench"),
        "pyarrow": ("select",),
        "ray": ("ray",),
        "safetensors": ("select",),
        "torch": ("select",),
        "transformers": ("select",),
        "vllm": ("cuda", "cpu"),
    }
)
"""The extras that install each module, in the order that messages name them."""

COMPARES = ("transformers", "torch")
"""Modules for comparing the layers of the shorter and the dense model."""


class MissingExtraError(SlebError):
    """A missing package that only some commands need."""


def missing(*modules: str) -> str | None:
    """Return the first missing module, without importing any; None if all are installed."""
    return next((module for module in modules if find_spec(module) is None), None)


def install_hint(module: str) -> str:
    """Return the command that installs a module's package; with several extras, any of them."""
    return " or ".join(f"pip install 'sleb-serve[{extra}]'" for extra in EXTRAS[module])


def require(what: str, *modules: str) -> None:
    """Refuse early if an extra is missing that would be needed later.

    Raises:
        MissingExtraError: names the first missing module.
    """
    if (module := missing(*modules)) is not None:
        raise MissingExtraError(f"{what} needs {module}: {install_hint(module)}")


@contextmanager
def extras_named(what: str) -> Iterator[None]:
    """Turn a failed import of an extra's module into an error that names the extra.

    Other failed imports are unchanged: modules of no extra, or installed modules that fail.

    Args:
        what: the command that needs the module.

    Raises:
        MissingExtraError: a module of an extra is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module in EXTRAS:
            require(what, module)
        raise
