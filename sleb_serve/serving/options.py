"""Parsing of `vllm serve` options on a command line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sleb_serve.errors import SlebError
from sleb_serve.protocol import (
    CONFIG_KEY,
    FORMAT,
    READER_KEY,
    check_reader,
)
from sleb_serve.utils import strict_json

_EXTRA = "--model-loader-extra-config"
_DOTTED_OVERRIDES = re.compile(r"--hf[-_]o(?!verrides(=|\Z))")


def taken(options: Sequence[str], *names: str) -> tuple[list[str], list[str | None]]:
    """Remove an option, which may have several names; return the rest and its values in order.

    A value is None if the command line ends after the option.
    """
    rest: list[str] = []
    values: list[str | None] = []
    pending = iter(options)
    for option in pending:
        name, equals, own = option.partition("=")
        if name.replace("_", "-") not in names:
            rest.append(option)
        else:
            values.append(own if equals else next(pending, None))
    return rest, values


def value_of(options: Sequence[str], *names: str) -> str | None:
    """Return the last value in `options` of an option with any of these names."""
    _, values = taken(options, *names)
    return values[-1] if values else None


def take_overrides(options: Sequence[str]) -> tuple[list[str], Mapping[str, Any]]:
    """Remove ``--hf-overrides`` from the options; return the rest and the overrides.

    Raises:
        SlebError: they are not a JSON object, or set the same keys as the manifest.
    """
    dotted = next((option for option in options if _DOTTED_OVERRIDES.match(option)), None)
    if dotted is not None:
        # vLLM would turn --hf-overrides.KEY into another --hf-overrides after ours.
        raise SlebError(
            f"{dotted}: write overrides as one --hf-overrides '{{\"key\": value}}', so that they "
            f"can be joined with the manifest's"
        )
    rest, values = taken(options, "--hf-overrides")
    found: dict[str, Any] = {}
    for text in values:
        if text is None:
            raise SlebError("--hf-overrides lacks its value; give a JSON object")
        try:
            found |= strict_json.any_object(strict_json.load(text.encode()), "--hf-overrides")
        except SlebError as error:
            raise SlebError(f"--hf-overrides: {error}") from None
    for key in ("architectures", CONFIG_KEY):
        if key in found:
            raise SlebError(
                f'--hf-overrides: "{key}" is set from the manifest; leave it out of the overrides'
            )
    return rest, found


def take_formats(options: Sequence[str]) -> list[str]:
    """Move the value of ``--load-format`` to the loader's reader."""
    if value_of(options, "--config-format") is not None:
        raise SlebError("--config-format is set from the manifest; leave the option out")
    rest, formats = taken(options, "--load-format")
    rest, extras = taken(rest, _EXTRA)
    given: dict[str, Any] = {}
    if extras and extras[-1] is not None:
        given = strict_json.any_object(strict_json.load(extras[-1].encode()), _EXTRA)
    given = with_reader(formats[-1] if formats else None, given)
    return [*rest, _EXTRA, json.dumps(given, separators=(",", ":"))] if given else rest


def with_reader(load_format: str | None, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return the loader's extra configuration with the load format for reading files."""
    reader = extra.get(READER_KEY) if load_format in (None, "auto", FORMAT) else load_format
    if reader is None:
        return dict(extra)
    check_reader(reader)
    return {**extra, READER_KEY: reader}
