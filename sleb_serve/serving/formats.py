"""The arguments of a server in the forms that other programs start it from."""

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
"""Options of the engine that sleb-serve itself writes, and what reads their values."""


def vllm_config(model: str, options: Sequence[str], environment: Mapping[str, str]) -> str:
    """A file for ``vllm serve --config``, in YAML.

    Args:
        model: folder or hub id.
        options: of ``vllm serve``.
        environment: what must be set beside the file; said in a comment.

    Raises:
        SlebError: an option cannot be said in such a file.
    """
    named = by_name(options)
    for name, value in named.items():
        if isinstance(value, str) and value.startswith("-") and not _NUMBER.fullmatch(value):
            raise SlebError(f"--{name}: a value that begins with - cannot stand in vLLM's file")
    said = "".join(f"{name}={value} " for name, value in environment.items())
    return f"# {said}vllm serve --config FILE.yaml\n{_yaml({'model': model, **named})}"


def platform_yaml(
    model: str,
    options: Sequence[str],
    environment: Mapping[str, str],
    note: Callable[[str], None] = lambda text: None,
) -> str:
    """The model as Ray Serve LLM takes it, and as a container that KServe takes, in YAML.

    Args:
        model: folder or hub id.
        options: of ``vllm serve``.
        environment: what must be set beside them.
        note: told which options have no place in Ray's configuration.

    Raises:
        SlebError: an option cannot be said in YAML, or needs vLLM to be read and there is none.
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
    """The arguments of vLLM's engine that `options` give, by name and with their types.

    Neither the model nor its served name is among them: Ray sets both. Options that are not
    sleb-serve's own are read by vLLM's parser.

    Raises:
        SlebError: an option has no plain value, or vLLM is needed and not installed.
    """
    named = by_name(options)
    named.pop("served-model-name", None)
    own = {name: _OWN[name](value) for name, value in named.items() if name in _OWN}
    others = {name: value for name, value in named.items() if name not in _OWN}
    found = {name.replace("-", "_"): value for name, value in own.items()}
    return {**(_read_by_vllm(model, others, note) if others else {}), **found}


def by_name(options: Sequence[str]) -> dict[str, Any]:
    """The values of options by their long names: a text, several, or True where there is none.

    Raises:
        SlebError: an option has only a short name here, is given twice, or is a file of others.
    """
    found: dict[str, list[str]] = {}
    values: list[str] | None = None
    for option in options:
        if not option.startswith("-") or _NUMBER.fullmatch(option):
            if values is None:
                raise SlebError(f"{option} stands behind no option; correct the arguments")
            values.append(option)
            continue
        name, equals, value = option.partition("=")
        head, dot, rest = name.removeprefix("--").partition(".")
        key = f"{head.replace('_', '-')}{dot}{rest}"
        if not name.startswith("--") or not head:
            raise SlebError(f"{name}: write the option's long name, which other forms need")
        if key == "config":
            raise SlebError("--config: give the file's options themselves, to have them in one")
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
                f"--{option} has no plain value that YAML could hold; leave it out, and write it "
                f"into engine_kwargs by hand"
            ) from error
    return result


def _yaml(value: Mapping[str, Any]) -> str:
    import yaml

    # Long texts stay on one line: what is folded is harder to compare, and to edit.
    text: str = yaml.safe_dump(
        value, sort_keys=False, width=1 << 20, allow_unicode=True, default_flow_style=False
    )
    return text
