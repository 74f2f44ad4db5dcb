"""Parsing and formatting of sizes in bytes."""

from __future__ import annotations

import re

from sleb_serve.errors import SlebError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]?)(?:i?B)?\Z", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Parse ``2GiB``, ``1.5G``, ``800M`` or a plain number; units are powers of 1024.

    Raises:
        SlebError: anything else.
    """
    match = _SIZE.match(text.strip())
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise SlebError(f"memory_budget={text}: give a size, as 2GiB or 800M")
    return size


def format_size(size: float) -> str:
    """Format bytes to a tenth of a unit."""
    for unit in ("GiB", "MiB"):
        scale = _UNITS[unit[0]]
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1024:.1f} KiB"
