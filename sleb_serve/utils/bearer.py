"""Whether a request holds one of a server's keys, as vLLM decides it for its own routes."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable


def authorized(header: str | None, keys: Iterable[str]) -> bool:
    """Whether an ``Authorization`` header holds one of `keys`; always, where there are none."""
    wanted = [_digest(key) for key in keys]
    if not wanted:
        return True
    scheme, _, given = (header or "").partition(" ")
    found = False
    # Each is compared, and in constant time, so that the time tells nothing of them.
    for digest in wanted:
        found |= secrets.compare_digest(_digest(given), digest)
    return found and scheme.lower() == "bearer"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
