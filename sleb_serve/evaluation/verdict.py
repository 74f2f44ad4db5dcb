"""Verdict on a pruning from its measurements, with two limits for each measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Literal, get_args

from sleb_serve.evaluation.picture import accuracy

SAFE_AGREEMENT, HARMFUL_AGREEMENT = 0.90, 0.75
"""Share of positions with the dense model's most likely token, on the worst text."""
SAFE_ANSWERS, HARMFUL_ANSWERS = 0.27, 0.09
"""Mean share of the dense model's short answers before the first difference. Follows from the
limits of agreement for 32 tokens: the mean of a + a^2 + … + a^32.
"""
SAFE_LOSS, HARMFUL_LOSS = 0.01, 0.05
"""Loss in mean task accuracy."""

Verdict = Literal["safe", "check", "harmful"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
"""From best to worst."""


def verdict(entry: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> Verdict | None:
    """Return the verdict on an entry of an evaluation.

    Args:
        entry: entry of a pruned model.
        results: all of the report's entries, with the dense model's if it was evaluated.

    Returns:
        ``harmful`` if a measure is beyond its second limit; ``safe`` if tokens and tasks were
        measured and every measure is within its first limit; otherwise ``check``; None without any
        measure.
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
    answers = entry.get("answers", {}).get("tokens")
    measures = (
        (agreement, SAFE_AGREEMENT, HARMFUL_AGREEMENT),
        (answers, SAFE_ANSWERS, HARMFUL_ANSWERS),
        (None if lost is None else -lost, -SAFE_LOSS, -HARMFUL_LOSS),
    )
    known = [(value, safe, harmful) for value, safe, harmful in measures if value is not None]
    if not entry["blocks"] or not known:
        return None
    if any(value < harmful for value, _, harmful in known):
        return "harmful"
    complete = agreement is not None and lost is not None
    return "safe" if complete and all(value >= safe for value, safe, _ in known) else "check"
