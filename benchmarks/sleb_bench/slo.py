"""Search for the highest request rate within a service level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SHARE = 0.9
"""Required share of requests that meet every limit."""
_CLOSE = 1.1
_MOST = 12


def met(result: dict[str, Any], requests: int) -> float:
    """Return the share of `requests` that met every limit, from ``vllm bench serve``'s JSON."""
    return float(result["request_goodput"] * result["duration"] / requests)


def bracket(tried: Sequence[tuple[float, float]]) -> tuple[float | None, float | None]:
    """Return the highest passing rate below the lowest failing one, or None.

    Args:
        tried: requests/s and the share that met the limits.
    """
    over = min((rate for rate, share in tried if share < SHARE), default=None)
    under = [r for r, share in tried if share >= SHARE and (over is None or r < over)]
    return max(under, default=None), over


def next_rate(tried: Sequence[tuple[float, float]], capacity: float) -> float | None:
    """Return the next rate; None when the bracket is within 10 % or after twelve rates.

    No rate above the capacity: few requests at such a rate are a burst, which a server can answer
    in time without sustaining the rate.

    Args:
        tried: requests/s and shares that met the limits so far.
        capacity: requests/s of the server with all requests sent at once.
    """
    low, high = bracket(tried)
    if len(tried) >= _MOST:
        return None
    if low is None and high is None:
        return capacity / 2
    if low is None:
        return (high or capacity) / 2
    if high is None:
        return min(1.5 * low, capacity) if low < capacity else None
    return None if high <= _CLOSE * low else (low * high) ** 0.5
