"""The highest rate of requests at which a service level is met."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SHARE = 0.9
"""The share of requests that must meet every limit."""
_CLOSE = 1.1
_MOST = 12


def met(result: dict[str, Any], requests: int) -> float:
    """The share of `requests` that met every limit, of the JSON of ``vllm bench serve``."""
    return float(result["request_goodput"] * result["duration"] / requests)


def bracket(tried: Sequence[tuple[float, float]]) -> tuple[float | None, float | None]:
    """The highest rate that met the level, below the lowest that did not; None if there is none.

    Args:
        tried: requests/s and the share that met the limits.
    """
    over = min((rate for rate, share in tried if share < SHARE), default=None)
    under = [r for r, share in tried if share >= SHARE and (over is None or r < over)]
    return max(under, default=None), over


def next_rate(tried: Sequence[tuple[float, float]], capacity: float) -> float | None:
    """The rate to try next; None when the bracket is narrow: 10 %, or twelve rates were tried.

    Args:
        tried: requests/s and the share that met the limits, so far.
        capacity: requests/s that the server takes when all come at once.
    """
    low, high = bracket(tried)
    if len(tried) >= _MOST:
        return None
    if low is None and high is None:
        return capacity / 2
    if low is None:
        return (high or capacity) / 2
    if high is None:
        return 1.5 * low
    return None if high <= _CLOSE * low else (low * high) ** 0.5
