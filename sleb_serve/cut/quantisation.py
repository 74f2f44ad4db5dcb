"""Names of layers in quantisation configs, renumbered.

Configs select unquantised or differently quantised modules by name, by regular expression
(compressed-tensors' ``re:…``, GPTQModel's ``+:…`` and ``-:…``) or with wildcards (ModelOpt). Names
are renumbered. A pattern that matches the same modules under their new numbers is kept; any other
is replaced by the list of its matches. Patterns may target names outside the checkpoint: parent
modules, vLLM's fused modules, or another prefix. A pattern that names layers but matches none of
these is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from sleb_serve.checkpoint.decoder import TOWERS
from sleb_serve.cut.config import Cut
from sleb_serve.errors import SlebError
from sleb_serve.utils.strict_json import short

_REGEX = re.compile(r"[\\^$()|+{]|\.\*")
_WILDCARD = re.compile(r"[*?\[]")
_PREFIXES = ("re:", "+:", "-:")
_ANY_NUMBER = re.compile(r"\[0-9\][+*]")

FUSED = (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj")))
"""vLLM's fused projections and the checkpoint's projections in each."""

OTHER_PREFIXES = ("", "model.", "language_model.model.", "model.language_model.", "language_model.")
"""Prefixes of the decoder's layers that patterns may use, besides the tensors' own."""


@dataclass(frozen=True)
class Names:
    """The dense checkpoint's modules and their names in the cut model.

    Attributes:
        modules: names of all modules with weights.
        cut: the removed layers.
        prefix: prefix of the decoder's layer numbers, such as ``model.layers.``.
    """

    modules: frozenset[str]
    cut: Cut
    prefix: str

    def rename(self, name: str) -> str | None:
        """Return a module's new name; None if it is removed."""
        return self.cut.name(name, self.prefix)

    @property
    def list_name(self) -> str:
        """Return the last name component of the decoder's layer list, such as ``layers``."""
        return (self.prefix.split(".")[-2:-1] or [""])[0]

    @cached_property
    def forms(self) -> tuple[tuple[tuple[str, str | None], ...], ...]:
        """Return old and new names (None if removed), with the checkpoint's and other prefixes.

        Includes parent modules and fused ones.
        """
        names = {held for name in self.modules for held in _held_by(name)} | self.modules
        for whole, parts in FUSED:
            split = (name.rpartition(".") for name in self.modules)
            names |= {f"{holder}.{whole}" for holder, _, part in split if part in parts}
        own = [(old, self.rename(old)) for old in sorted(names)]
        inside = [(old, new) for old, new in own if old.startswith(self.prefix)]
        start = len(self.prefix) - len(f"{self.list_name}.")
        others = (
            tuple((prefix + old[start:], new and prefix + new[start:]) for old, new in inside)
            for prefix in OTHER_PREFIXES
            if prefix != self.prefix[:start]
        )
        return (tuple(own), *others)


def renumbered(value: Any, names: Names) -> Any:
    """Renumber the layers in a quantisation config and drop removed ones.

    Raises:
        SlebError: a layer pattern is not a valid regular expression.
    """
    if isinstance(value, str) and _names_layers(value, names):
        parts = [value] if value.startswith(_PREFIXES) else value.split(",")
        return ",".join(new for p in parts for new in _new_names(p.strip(), names, is_key=False))
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
        found = _matched(_regex(body, text), names, text)
        if found is None:
            return [text]
        if is_key or prefix in ("+:", "-:"):
            return [f"{prefix}{re.escape(name)}$" for name in found]
        return found
    layer = _layer_part(body, names)
    if layer is not None:
        parts = body.split(".")
        place = names.cut.place(int(parts[layer]))
        return (
            [] if place is None else [".".join([*parts[:layer], str(place), *parts[layer + 1 :]])]
        )
    if _WILDCARD.search(body):
        found = _matched(lambda name: fnmatchcase(name, body), names, text)
        return [text] if found is None else found
    return [text]


def _layer_part(name: str, names: Names) -> int | None:
    """Find the decoder layer number in a dotted name, which may have wildcards."""
    parts = name.split(".")
    for place in range(1, len(parts)):
        if parts[place].isdecimal() and parts[place - 1] == names.list_name:
            return None if TOWERS.intersection(parts[:place]) else place
    return None


def _matched(matches: Callable[[str], bool], names: Names, text: str) -> list[str] | None:
    """Return the new names of a pattern's matches; None if the pattern still matches them."""
    for form in names.forms:
        hits = [(matches(old), new is not None and matches(new), new) for old, new in form]
        if any(before or after for before, after, _ in hits):
            if all(before == after for before, after, new in hits if new is not None):
                return None
            return [new for before, _, new in hits if before and new is not None]
    if _names_layers(text, names):
        raise SlebError(
            f"the quantisation's config names layers by {short(text)}, which matches no module of "
            f"the checkpoint, so it cannot be renumbered; correct it"
        )
    return None


def _names_layers(text: str, names: Names) -> bool:
    """Return whether layers are named individually, not all alike."""
    plain = _ANY_NUMBER.sub("", text)
    numbers = re.findall(rf"(?<![^\W_]){re.escape(names.list_name)}\W*(\d+)", plain)
    return any(int(number) < names.cut.num_blocks for number in numbers)


def _held_by(name: str) -> list[str]:
    """Return the parents of a module, outermost first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _regex(body: str, text: str) -> Callable[[str], bool]:
    try:
        pattern = re.compile(body)
    except re.error as error:
        raise SlebError(
            f"the quantisation's config names layers by {text}, which is not a regular expression "
            f"({error}); correct it"
        ) from error
    return lambda name: pattern.match(name) is not None
