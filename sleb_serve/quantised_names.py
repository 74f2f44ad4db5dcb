"""Names of layers in quantisation configs, renumbered.

Which modules a checkpoint leaves as they are, or quantises in another way, is said by name, by a
regular expression (compressed-tensors' ``re:…``, GPTQModel's ``+:…`` and ``-:…``) or with wildcards
(ModelOpt). A name is renumbered. A pattern that matches the same modules under their new numbers is
left as it is; any other becomes the list of what it matches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from sleb_serve.errors import SlebError

QUANTISATION_KEYS = ("quantization_config", "compression_config")
"""Where config.json keeps how the checkpoint is quantised."""

QUANTISATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files beside config.json that say the same."""

_REGEX = re.compile(r"[\\^$()|+{]|\.\*")
_WILDCARD = re.compile(r"[*?\[]")
_PREFIXES = ("re:", "+:", "-:")


@dataclass(frozen=True)
class Names:
    """The dense checkpoint's modules, and what they are called in the cut model.

    Attributes:
        modules: names of all modules that have weights.
        rename: a module's new name, None if it is removed.
        place: a layer's new number, None if it is removed.
        list_name: the last part of the name of the decoder's list of layers, as ``layers``.
        others: parts of names that lead out of the decoder.
    """

    modules: frozenset[str]
    rename: Callable[[str], str | None]
    place: Callable[[int], int | None]
    list_name: str
    others: frozenset[str]

    @cached_property
    def kept(self) -> tuple[tuple[str, str], ...]:
        """Each module that stays, by its old and its new name."""
        pairs = ((old, self.rename(old)) for old in sorted(self.modules))
        return tuple((old, new) for old, new in pairs if new is not None)


def renumbered(value: Any, names: Names) -> Any:
    """A quantisation's config with the layers it names renumbered; removed ones are left out.

    Raises:
        SlebError: it names layers by a pattern that is no regular expression.
    """
    if isinstance(value, Mapping):
        return {
            new: renumbered(entry, names)
            for key, entry in value.items()
            for new in _new_names(key, names, is_key=True)
        }
    if isinstance(value, list):
        return [
            new
            for entry in value
            for new in (
                _new_names(entry, names, is_key=False)
                if isinstance(entry, str)
                else [renumbered(entry, names)]
            )
        ]
    return value


def _new_names(text: str, names: Names, *, is_key: bool) -> list[str]:
    prefix = next((p for p in _PREFIXES if text.startswith(p)), "")
    body = text.removeprefix(prefix)
    if prefix or _REGEX.search(body):
        found = _matched(_regex(body, text), names)
        if found is None:
            return [text]
        if is_key or prefix in ("+:", "-:"):
            return [f"{prefix}{re.escape(name)}$" for name in found]
        return found
    layer = _layer_part(body, names)
    if layer is not None:
        parts = body.split(".")
        place = names.place(int(parts[layer]))
        return (
            [] if place is None else [".".join([*parts[:layer], str(place), *parts[layer + 1 :]])]
        )
    if _WILDCARD.search(body):
        found = _matched(lambda name: fnmatchcase(name, body), names)
        return [text] if found is None else found
    return [text]


def _layer_part(name: str, names: Names) -> int | None:
    """Which part of a dotted name, be it with wildcards, is the number of a decoder layer."""
    parts = name.split(".")
    for place in range(1, len(parts)):
        if parts[place].isdecimal() and parts[place - 1] == names.list_name:
            return None if names.others.intersection(parts[:place]) else place
    return None


def _matched(matches: Callable[[str], bool], names: Names) -> list[str] | None:
    """The new names of what a pattern matches; None if it matches just these by itself."""
    if all(matches(old) == matches(new) for old, new in names.kept):
        return None
    return [new for old, new in names.kept if matches(old)]


def _regex(body: str, text: str) -> Callable[[str], bool]:
    try:
        pattern = re.compile(body)
    except re.error as error:
        raise SlebError(
            f"the quantisation's config names layers by {text}, which is no regular expression "
            f"({error}); correct it"
        ) from error
    return lambda name: pattern.match(name) is not None
