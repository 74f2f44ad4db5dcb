"""Packages that not every command needs, and the extras of sleb-serve that install them."""

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


def require(what: str, *modules: str) -> None:
    """Refuse to begin what would fail at its end, for want of an extra.

    Raises:
        MissingExtraError: naming the first of the modules that is not installed.
    """
    if (module := missing(*modules)) is not None:
        raise MissingExtraError(f"{what} needs {module}: {install_hint(module)}")


@contextmanager
def extras_named(what: str) -> Iterator[None]:
    """Turn an import that fails for want of an extra into an error that names the extra.

    Other imports that fail are left as they are: a module of no extra, or one that is installed and
    fails by itself.

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
