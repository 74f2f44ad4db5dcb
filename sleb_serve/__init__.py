"""Depth-pruned LLMs: find the blocks to remove, serve the model without them, measure the gain.

Importing this module loads neither torch nor vLLM; names are loaded on first use.

    >>> from sleb_serve import SelectConfig, select
    >>> manifest = select("./my-model", SelectConfig(remove=6, calibration="python-docs"))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sleb_serve.convert.export import export
    from sleb_serve.convert.rebind import rebind
    from sleb_serve.errors import SlebError
    from sleb_serve.evaluation.evaluate import EvalConfig, evaluate
    from sleb_serve.healing.config import HealConfig
    from sleb_serve.healing.pipeline import heal
    from sleb_serve.manifest.reader import read_manifest
    from sleb_serve.manifest.schema import Manifest
    from sleb_serve.publishing.push import push
    from sleb_serve.selection.config import SelectConfig
    from sleb_serve.selection.pipeline import select
    from sleb_serve.serving.command import serve_command

__version__ = "0.1.0"

__all__ = [
    "EvalConfig",
    "HealConfig",
    "Manifest",
    "SelectConfig",
    "SlebError",
    "evaluate",
    "export",
    "heal",
    "push",
    "read_manifest",
    "rebind",
    "select",
    "serve_command",
]

_HOMES = {
    "EvalConfig": "sleb_serve.evaluation.evaluate",
    "HealConfig": "sleb_serve.healing.config",
    "Manifest": "sleb_serve.manifest.schema",
    "SelectConfig": "sleb_serve.selection.config",
    "SlebError": "sleb_serve.errors",
    "evaluate": "sleb_serve.evaluation.evaluate",
    "export": "sleb_serve.convert.export",
    "heal": "sleb_serve.healing.pipeline",
    "push": "sleb_serve.publishing.push",
    "read_manifest": "sleb_serve.manifest.reader",
    "rebind": "sleb_serve.convert.rebind",
    "select": "sleb_serve.selection.pipeline",
    "serve_command": "sleb_serve.serving.command",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
