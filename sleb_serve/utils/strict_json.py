"""Strict JSON: rejects anything unexpected, and names its place in the file.

Each reader takes a value and its place, and returns the value with a known type. Duplicate keys,
NaN and infinities, booleans for numbers, unknown keys, excessive nesting and text that is not
Unicode are refused with a `SlebError`.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sleb_serve.errors import SlebError

_MAX_DEPTH = 32
_SURROGATE = re.compile("[\ud800-\udfff]")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


def canonical(value: object) -> bytes:
    """Serialise JSON canonically for digests: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def load(data: bytes, *, of_others: bool = False) -> object:
    """Parse UTF-8 JSON, and refuse input that parsers commonly accept.

    Args:
        data: the text.
        of_others: allow values that other programs write into configs: infinities, longer integers.
    """
    longest = 40 if of_others else 20

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise SlebError(f"key {short(twice)} stands twice in one object; remove one")
        return result

    def constant(name: str) -> object:
        if of_others and name != "NaN":
            return float(name)
        raise SlebError(f"{name} is not a JSON number; the file was not written by sleb-serve")

    def bounded_int(text: str) -> int:
        if len(text) > longest:
            raise SlebError(f"number {text[:20]}… is out of range; counts are smaller")
        return int(text)

    def finite_float(text: str) -> float:
        number = float(text)
        if not math.isfinite(number):
            raise SlebError(f"number {short(text)} is out of range; losses are finite")
        return number

    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=constant,
            parse_int=bounded_int,
            parse_float=finite_float,
        )
    except UnicodeDecodeError as error:
        raise SlebError(f"not UTF-8 text (byte {error.start}); give a text file") from None
    except json.JSONDecodeError as error:
        raise SlebError(
            f"not JSON ({error.msg} at line {error.lineno} column {error.colno}): the file is cut "
            f"short or was edited by hand"
        ) from None
    except RecursionError:
        raise SlebError("nested too deeply") from None
    _check_depth_and_text(value)
    return value


def _check_depth_and_text(value: object) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        if not level:
            return
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.keys())
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, str) and not item.isascii() and _SURROGATE.search(item):
                # JSON can encode half a surrogate pair, but UTF-8 cannot, so it could not be
                # written.
                raise SlebError(f"text {short(item)} has a lone surrogate; it is not Unicode text")
        level = below
    raise SlebError("nested too deeply")


def short(value: object) -> str:
    """Format a value for a message: ASCII, one line, at most 60 characters."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "…"


def object_(
    value: object, where: str, *, required: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, Any]:
    """Read an object with all required keys, any optional ones, and no others."""
    if not isinstance(value, dict):
        raise SlebError(f"{where} must be an object, found {short(value)}")
    unknown = next((key for key in value if key not in required and key not in optional), None)
    if unknown is not None:
        known = ", ".join((*required, *optional))
        raise SlebError(
            f"unknown key {short(unknown)} in {where} (known: {known}); "
            f"remove it, or upgrade sleb-serve if a newer one wrote the file"
        )
    missing = next((key for key in required if key not in value), None)
    if missing is not None:
        raise SlebError(f"{where} lacks the key {missing!r}")
    return value


def without_advice(error: SlebError) -> str:
    """Describe the error, without the next step, which only applies to manifests."""
    return str(error).partition(";")[0]


def any_object(value: object, where: str) -> dict[str, Any]:
    """Read an object with any keys."""
    if not isinstance(value, dict):
        raise SlebError(f"{where} must be an object, found {short(value)}")
    return value


def list_(value: object, where: str) -> list[Any]:
    """Read a list of any values."""
    if not isinstance(value, list):
        raise SlebError(f"{where} must be a list, found {short(value)}")
    return value


def line(value: object, where: str) -> str:
    """Read one line of printable text without control characters or line breaks."""
    if not isinstance(value, str) or not value or not value.isprintable():
        raise SlebError(f"{where} must be a line of text, found {short(value)}")
    return value


def sha256(value: object, where: str) -> str:
    """Read a SHA-256 digest in lower-case hexadecimal."""
    if not isinstance(value, str) or not _SHA256.match(value):
        raise SlebError(f"{where} must be 64 lower-case hexadecimal digits, found {short(value)}")
    return value


def integer(value: object, where: str, low: int, high: int) -> int:
    """Read a whole number from `low` to `high`."""
    # bool is a subclass of int; a manifest with true for 1 was not written by this program.
    if isinstance(value, bool) or not isinstance(value, int):
        raise SlebError(f"{where} must be a whole number, found {short(value)}")
    if not low <= value <= high:
        raise SlebError(f"{where} must be between {low} and {high}, found {short(value)}")
    return value


def number(value: object, where: str) -> float:
    """Read a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SlebError(f"{where} must be a number, found {short(value)}")
    return float(value)
