"""Reader for the official code's results and output."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sleb_serve.convert.found import Found, block_numbers
from sleb_serve.errors import SlebError

_ORDER = re.compile(r"\bRemoval Order: *(\[.*)$")


_PROGRESS = re.compile(r"\b(?:current block removal list|current skip list): *(\[.*)$", re.I)


_TOTAL = re.compile(r"^# Total Blocks: *([0-9]{1,9}) *$")


@dataclass(frozen=True)
class Run:
    """A run of SLEB from its output; ``blocks`` is None if the list cannot be read."""

    blocks: list[Any] | None
    total: int | None
    finished: bool


def sleb_runs(text: str) -> list[Run]:
    """Read the runs in SLEB's result file or output, in order.

    ``sleb.py`` prints the list after each removal and its final order at the end. A list that does
    not extend the previous one belongs to another run.
    """
    runs: list[Run] = []
    open_run: Run | None = None
    total = None
    for line in text.splitlines():
        if found := _TOTAL.match(line):
            total = int(found[1])
        elif found := _PROGRESS.search(line):
            blocks = _list_in(found[1])
            if open_run is not None and not _goes_on(open_run.blocks, blocks):
                runs.append(open_run)
            open_run = Run(blocks, None, finished=False)
        elif found := _ORDER.search(line):
            blocks = _list_in(found[1])
            if open_run is not None and not _goes_on(open_run.blocks, blocks):
                runs.append(open_run)
            runs.append(Run(blocks, total, finished=True))
            open_run = total = None
    return runs if open_run is None else [*runs, open_run]


def _list_in(text: str) -> list[Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def _goes_on(before: list[Any] | None, after: list[Any] | None) -> bool:
    return before is not None and after is not None and after[: len(before)] == before


def of_sleb(runs: Sequence[Run], where: str, num_blocks: int, number: int | None) -> Found:
    """Return the blocks removed by one run of the official code, in order."""
    number = len(runs) if number is None else number
    if not 1 <= number <= len(runs):
        raise SlebError(f"run={number}: {where} holds {len(runs)} runs; choose one of them")
    run = runs[number - 1]
    if run.total is not None and run.total != num_blocks:
        raise SlebError(
            f"run {number} of {where} is of a model with {run.total} blocks, this one has "
            f"{num_blocks}; choose another with `run`, or give that model"
        )
    blocks = block_numbers(run.blocks, f"{where}, run {number},")
    kind = "run" if run.finished else "unfinished run"
    return Found(blocks, f"SLEB's {kind} {number} of {len(runs)}")
