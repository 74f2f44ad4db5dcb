"""Non-negative least squares for a few unknowns, without numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence

_SINGULAR = 1e-10
_TOLERANCE = 1e-10


def non_negative(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Solve non-negative least squares with Lawson's and Hanson's active set method.

    Args:
        rows: one equation per row, with a number per unknown.
        values: the target of each row.

    Returns:
        A coefficient per unknown; 0 for unknowns that the rows cannot separate from others.
    """
    number = len(rows[0])
    norms = [math.sqrt(sum(row[i] ** 2 for row in rows)) or 1.0 for i in range(number)]
    scaled = [[row[i] / norms[i] for i in range(number)] for row in rows]
    gram = [[sum(r[i] * r[j] for r in scaled) for j in range(number)] for i in range(number)]
    right = [sum(r[i] * v for r, v in zip(scaled, values, strict=True)) for i in range(number)]
    found, free, barred = [0.0] * number, set[int](), set[int]()
    limit = _TOLERANCE * max(map(abs, right), default=0.0)
    for _ in range(10 * number):
        slopes = {
            i: right[i] - sum(gram[i][j] * found[j] for j in free)
            for i in range(number)
            if i not in free | barred
        }
        best = max(slopes, key=lambda i: slopes[i], default=None)
        if best is None or slopes[best] <= limit:
            break
        free.add(best)
        if _solved(gram, right, sorted(free)) is None:
            free.discard(best)
            barred.add(best)
            continue
        found = _stepped(gram, right, found, free)
    return [value / norm for value, norm in zip(found, norms, strict=True)]


def _stepped(
    gram: Sequence[Sequence[float]], right: Sequence[float], found: list[float], free: set[int]
) -> list[float]:
    """Fit the coefficients of ``free``, and drop those that would be negative."""
    while free:
        places = sorted(free)
        best = _solved(gram, right, places) or [0.0] * len(places)
        if min(best) > 0:
            result = [0.0] * len(found)
            for place, value in zip(places, best, strict=True):
                result[place] = value
            return result
        # Move towards the optimum until the first coefficient reaches zero.
        far = min(
            found[place] / (found[place] - value)
            for place, value in zip(places, best, strict=True)
            if value <= 0
        )
        for place, value in zip(places, best, strict=True):
            found[place] += far * (value - found[place])
            if value <= 0 and found[place] <= _TOLERANCE:
                found[place] = 0.0
                free.discard(place)
    return found


def _solved(
    gram: Sequence[Sequence[float]], right: Sequence[float], places: Sequence[int]
) -> list[float] | None:
    """Gaussian elimination over some of the unknowns; None if singular."""
    table = [[*(gram[i][j] for j in places), right[i]] for i in places]
    size = len(places)
    for column in range(size):
        pivot = max(range(column, size), key=lambda row: abs(table[row][column]))
        if abs(table[pivot][column]) < _SINGULAR:
            return None
        table[column], table[pivot] = table[pivot], table[column]
        for row in range(column + 1, size):
            factor = table[row][column] / table[column][column]
            for k in range(column, size + 1):
                table[row][k] -= factor * table[column][k]
    found = [0.0] * size
    for row in reversed(range(size)):
        rest = sum(table[row][k] * found[k] for k in range(row + 1, size))
        found[row] = (table[row][size] - rest) / table[row][row]
    return found
