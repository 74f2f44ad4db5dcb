"""A server's arguments in the formats of other launchers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from sleb_serve.errors import SlebError
from sleb_serve.utils.extras import require

FORMATS = ("shell", "json", "vllm-config", "yaml")

_NUMBER = re.compile(r"-\d+(\.\d+)?")
_OWN: Mapping[str, Callable[[str], Any]] = MappingProxyType(
    {
        "revision": str,
        "config-format": str,
        "load-format": str,
        "hf-overrides": json.loads,
        "model-loader-extra-config": json.loads,
    }
)
"""Engine options that sleb-serve itself writes, and their parsers."""


def vllm_config(model: str, options: Sequence[str], environment: Mapping[str, str]) -> str:
    """Return a YAML file for ``vllm serve --config``.

    Args:
        model: folder or hub id.
        options: of ``vllm serve``.
        environment: variables to set, listed in a comment.

    Raises:
        SlebError: an option cannot be expressed in such a file.
    """
    named = by_name(options)
    for name, value in named.items():
        if isinstance(value, str) and value.startswith("-") and not _NUMBER.fullmatch(value):
            raise SlebError(
                f"--{name}: a value that begins with - cannot be written in vLLM's file"
            )
    said = "".join(f"{name}={value} " for name, value in environment.items())
    return f"# {said}vllm serve --config FILE.yaml\n{_yaml({'model': model, **named})}"


def platform_yaml(
    model: str,
    options: Sequence[str],
    environment: Mapping[str, str],
    note: Callable[[str], None] = lambda text: None,
) -> str:
    """Return YAML for Ray Serve LLM and for a KServe container.

    Args:
        model: folder or hub id.
        options: of ``vllm serve``.
        environment: variables to set.
        note: called with options that Ray's configuration does not support.

    Raises:
        SlebError: an option cannot be expressed in YAML, or parsing it needs vLLM, which is
            missing.
    """
    served = by_name(options).get("served-model-name", model)
    ray = {
        "model_loading_config": {
            "model_id": served if isinstance(served, str) else served[0],
            "model_source": model,
        },
        "engine_kwargs": engine_kwargs(model, options, note),
        "runtime_env": {"env_vars": dict(environment)},
    }
    container = {
        "command": ["vllm", "serve"],
        "args": [model, *options],
        "env": [{"name": name, "value": value} for name, value in environment.items()],
    }
    return (
        f"# Ray Serve LLM: an entry of llm_configs.\n{_yaml({'ray_serve_llm': ray})}"
        f"# KServe: of a predictor's container, whose image has vLLM and sleb-serve.\n"
        f"{_yaml({'kserve': container})}"
    )


def engine_kwargs(
    model: str, options: Sequence[str], note: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Return the engine arguments in `options` by name, with their types.

    The model and its served name are excluded, because Ray sets both. vLLM's parser reads options
    that are not sleb-serve's own.

    Raises:
        SlebError: an option has no plain value, or vLLM is needed but not installed.
    """
    named = by_name(options)
    named.pop("served-model-name", None)
    own = {name: _OWN[name](value) for name, value in named.items() if name in _OWN}
    others = {name: value for name, value in named.items() if name not in _OWN}
    found = {name.replace("-", "_"): value for name, value in own.items()}
    return {**(_read_by_vllm(model, others, note) if others else {}), **found}


def by_name(options: Sequence[str]) -> dict[str, Any]:
    """Return the values of options by long name: a text, several, or True without a value.

    Raises:
        SlebError: an option is given by a short name or twice, or is a file of other options.
    """
    found: dict[str, list[str]] = {}
    values: list[str] | None = None
    for option in options:
        if not option.startswith("-") or _NUMBER.fullmatch(option):
            if values is None:
                raise SlebError(f"{option} follows no option; correct the arguments")
            values.append(option)
            continue
        name, equals, value = option.partition("=")
        head, dot, rest = name.removeprefix("--").partition(".")
        key = f"{head.replace('_', '-')}{dot}{rest}"
        if not name.startswith("--") or not head:
            raise SlebError(f"{name}: write the option's long name")
        if key == "config":
            raise SlebError("--config: give the file's options directly instead")
        if key in found:
            raise SlebError(f"--{key} is given twice; give it once")
        values = found[key] = [value] if equals else []
    return {
        name: values[0] if len(values) == 1 else values or True for name, values in found.items()
    }


def _read_by_vllm(
    model: str, named: Mapping[str, Any], note: Callable[[str], None]
) -> dict[str, Any]:
    require("--format yaml with options of vLLM's own", "vllm")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    dotted = next((name for name in named if "." in name), None)
    if dotted is not None:
        raise SlebError(f"--{dotted}: write it as one option with JSON, --{dotted.split('.')[0]}")
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(allow_abbrev=False))
    base = ["--model", model]
    before = vars(parser.parse_args(base))
    result: dict[str, Any] = {}
    for name, value in named.items():
        values = [] if value is True else [value] if isinstance(value, str) else value
        given = [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *values]
        after, unknown = parser.parse_known_args([*base, *given])
        if unknown:
            note(f"--{name} is no option of the engine; Ray Serve has its own")
            continue
        for key, now in vars(after).items():
            if now != before[key]:
                result[key] = now
    for key, value in result.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            option = key.replace("_", "-")
            raise SlebError(
                f"--{option} has a value that cannot be written as YAML; omit it, and add it to "
                "engine_kwargs by hand"
            ) from error
    return result


def _yaml(value: Mapping[str, Any]) -> str:
    import yaml

    # Keep long texts on one line: folded ones are harder to compare and edit.
    text: str = yaml.safe_dump(
        value, sort_keys=False, width=1 << 20, allow_unicode=True, default_flow_style=False
    )
    return text
