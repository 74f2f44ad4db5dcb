"""Names of layers in quantisation configs, renumbered.

Which modules a checkpoint leaves as they are, or quantises in another way, is said by name, by a
regular expression (compressed-tensors' ``re:…``, GPTQModel's ``+:…`` and ``-:…``) or with wildcards
(ModelOpt). A name is renumbered. A pattern that matches the same modules under their new numbers is
left as it is; any other becomes the list of what it matches. A pattern may be written for names
that the checkpoint does not have: for a module that holds others, for vLLM's fused ones, or with
another prefix. One that names layers and matches none of these is refused.
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
"""What vLLM calls projections that it keeps as one, and those of the checkpoint."""

OTHER_PREFIXES = ("", "model.", "language_model.model.", "model.language_model.", "language_model.")
"""What may stand before the decoder's list of layers in a pattern, whatever the tensors have."""


@dataclass(frozen=True)
class Names:
    """The dense checkpoint's modules, and what they are called in the cut model.

    Attributes:
        modules: names of all modules that have weights.
        cut: the layers that go.
        prefix: what comes before the decoder's layer numbers in them, as ``model.layers.``.
    """

    modules: frozenset[str]
    cut: Cut
    prefix: str

    def rename(self, name: str) -> str | None:
        """A module's new name, None if it is removed."""
        return self.cut.name(name, self.prefix)

    @property
    def list_name(self) -> str:
        """The last part of the name of the decoder's list of layers, as ``layers``."""
        return (self.prefix.split(".")[-2:-1] or [""])[0]

    @cached_property
    def forms(self) -> tuple[tuple[tuple[str, str | None], ...], ...]:
        """Old and new names (None if removed): as the checkpoint has them, and by other prefixes.

        With the names of modules that hold others, and of fused ones.
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
    """A quantisation's config with the layers it names renumbered; removed ones are left out.

    Raises:
        SlebError: it names layers by a pattern that is no regular expression.
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
    """Which part of a dotted name, be it with wildcards, is the number of a decoder layer."""
    parts = name.split(".")
    for place in range(1, len(parts)):
        if parts[place].isdecimal() and parts[place - 1] == names.list_name:
            return None if TOWERS.intersection(parts[:place]) else place
    return None


def _matched(matches: Callable[[str], bool], names: Names, text: str) -> list[str] | None:
    """The new names of what a pattern matches; None if it matches just these by itself."""
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
    """Whether some of the layers are named, and not all of them alike."""
    plain = _ANY_NUMBER.sub("", text)
    numbers = re.findall(rf"(?<![^\W_]){re.escape(names.list_name)}\W*(\d+)", plain)
    return any(int(number) < names.cut.num_blocks for number in numbers)


def _held_by(name: str) -> list[str]:
    """The modules that hold a module, outermost first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _regex(body: str, text: str) -> Callable[[str], bool]:
    try:
        pattern = re.compile(body)
    except re.error as error:
        raise SlebError(
            f"the quantisation's config names layers by {text}, which is no regular expression "
            f"({error}); correct it"
        ) from error
    return lambda name: pattern.match(name) is not None
