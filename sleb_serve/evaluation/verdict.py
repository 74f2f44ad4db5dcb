"""Whether a pruning looks safe, by what was measured: two limits for each measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

from sleb_serve.evaluation.picture import accuracy

SAFE_AGREEMENT, HARMFUL_AGREEMENT = 0.90, 0.75
"""Share of places with the dense model's likeliest token, on the text where it is least."""
SAFE_LOSS, HARMFUL_LOSS = 0.01, 0.05
"""Mean accuracy of the tasks that is lost."""

Verdict = Literal["safe", "check", "harmful"]


def verdict(entry: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> Verdict | None:
    """What an evaluation's entry says of its pruning.

    Args:
        entry: of a pruned model.
        results: all of the report's, the dense model's among them if it was evaluated.

    Returns:
        ``harmful`` if a measure is beyond its second limit; ``safe`` if both were measured and are
        within their first ones; ``check`` for all else; None if neither was measured.
    """
    shares = entry["agreement"].values()
    agreement = min(shares) if shares else None
    dense = next((other for other in results if not other["blocks"]), None)
    lost = None
    if dense is not None and entry["tasks"] and dense["tasks"]:
        lost = fmean(
            accuracy(dense["tasks"][task])[0] - accuracy(entry["tasks"][task])[0]
            for task in entry["tasks"]
        )
    if not entry["blocks"] or (agreement is None and lost is None):
        return None
    least = 1.0 if agreement is None else agreement
    if least < HARMFUL_AGREEMENT or (lost or 0.0) > HARMFUL_LOSS:
        return "harmful"
    if agreement is None or lost is None:
        return "check"
    return "safe" if agreement >= SAFE_AGREEMENT and lost <= SAFE_LOSS else "check"
