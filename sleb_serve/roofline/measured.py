"""Step times from measurements of `sleb-serve bench`, instead of the roofline.

The simulation computes the steps of each load in the records: new tokens, sequences, tokens
attended to and read. A step's time is modelled as a sum: a piecewise linear function of the new
tokens, with corners at the measured steps, and, if the records have enough different loads, terms
proportional to the tokens read, the tokens attended to, and the sequences. No term is negative. The
fit minimises the relative errors of the measured times.

Dense and pruned runs of the same loads are fitted together: each term has a part outside the blocks
and a part in proportion to the blocks that are left. So noise cannot make the pruned model faster
than its removed blocks allow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, pairwise
from pathlib import Path
from statistics import median
from typing import Any

from sleb_serve.errors import SlebError, first_line
from sleb_serve.roofline.simulation import Limits, Request, simulate
from sleb_serve.roofline.workload import Workload
from sleb_serve.utils import strict_json
from sleb_serve.utils.least_squares import non_negative

Features = tuple[int, int, float, float]
"""A step's new tokens, sequences, tokens attended to, tokens of KV cache read."""
RECORDS = "records.jsonl"
_EXTRAS = ("read", "attended", "sequence")
"""Optional terms of a step's time, besides that of its new tokens."""
_ACCEPTED = 0.1
"""Relative error up to which all variants share one fit, unless their own have a larger one. Blocks
of different sizes would have a larger one."""
_DEFAULT_TOKENS, _DEFAULT_SEQUENCES = 2048, 256
"""vLLM's defaults, for engines started without explicit values."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step, fitted to measured runs.

    Attributes:
        corners: numbers of new tokens at the breakpoints, in order.
        heights: seconds at each corner.
        slope: seconds per new token beyond the last corner.
        read: seconds per token of KV cache read; ``attended``, per token attended to; ``sequence``,
            per sequence.
    """

    corners: tuple[int, ...]
    heights: tuple[float, ...]
    slope: float
    read: float = 0.0
    attended: float = 0.0
    sequence: float = 0.0

    def __call__(self, new: int, sequences: int, attended: float, cached: float) -> float:
        """Return the seconds of one step; see `sleb_serve.roofline.step.Roofline`."""
        rest = self.read * cached + self.attended * attended + self.sequence * sequences
        corners, heights = self.corners, self.heights
        if new <= corners[0]:
            return heights[0] + rest
        if new >= corners[-1]:
            return heights[-1] + (new - corners[-1]) * self.slope + rest
        place = next(i for i, corner in enumerate(corners) if corner >= new)
        low, high = corners[place - 1], corners[place]
        part = (new - low) / (high - low)
        return heights[place - 1] + part * (heights[place] - heights[place - 1]) + rest


@dataclass(frozen=True)
class Measured:
    """A variant from the records.

    Attributes:
        name: its name in the records.
        removed: number of removed blocks.
        kv_tokens: tokens in its KV cache, in blocks of ``block``.
        max_tokens: maximum new tokens per step, and ``max_sequences``, requests.
        step: its step times.
        loads: number of fitted loads, and ``error``, the largest relative error over them.
    """

    name: str
    removed: int
    kv_tokens: int
    block: int
    max_tokens: int
    max_sequences: int
    step: StepTimes
    loads: int
    error: float


@dataclass(frozen=True)
class Timed:
    """One kind of load: its steps and their total seconds."""

    steps: tuple[Features, ...]
    seconds: float


def steps_of(workload: Workload, tokens: int, sequences: int, memory: int) -> tuple[Features, ...]:
    """Return the timed steps of a workload with all requests sent at once."""
    request = Request(0.0, workload.prompt_length, workload.output_length)
    found = steps_taken([request] * workload.num_requests, Limits(tokens, sequences, memory, 0, 1))
    # Generation is timed from the end of all prompts.
    return found[1:] if workload.measure == "decode" else found


def steps_taken(requests: Sequence[Request], limits: Limits) -> tuple[Features, ...]:
    """Return an engine's steps for requests sent at once."""
    found: list[Features] = []

    def record(new: int, sequences: int, attended: float, cached: float) -> float:
        found.append((new, sequences, attended, cached))
        return 1.0

    simulate(requests, limits, record)
    return tuple(found)


Fit = tuple[StepTimes, float]
"""Step times, and their largest relative error over the measured runs."""


def fit(runs: Sequence[Timed]) -> Fit:
    """Fit the step time to measured runs.

    Raises:
        SlebError: the runs have only one step size.
    """
    return _best([runs], [()])[0]


def fit_together(runs: Sequence[Sequence[Timed]], shares: Sequence[float]) -> list[Fit]:
    """Fit the step times of several prunings of one model.

    Args:
        runs: by pruning, at least two.
        shares: by pruning, the share of the blocks that is left.

    Raises:
        SlebError: the runs have only one step size.
    """
    return _best(runs, [(share,) for share in shares])


def _best(runs: Sequence[Sequence[Timed]], shares: Sequence[tuple[float, ...]]) -> list[Fit]:
    corners = sorted({_usual(run.steps) for run in chain(*runs)})
    if len(corners) < 2:
        raise SlebError(
            "the records hold steps of one size alone, which does not tell how a step's time grows "
            "with its tokens; run sleb-serve bench with --workloads prefill,decode"
        )
    # Only as many terms as the loads can separate; of these, the best fit.
    extras = max(0, min(len(_EXTRAS), min(map(len, runs)) - len(corners)))
    fits = [_fitted(runs, shares, corners, chosen) for chosen in combinations(_EXTRAS, extras)]
    return min(fits, key=lambda found: max(error for _, error in found))


def _fitted(
    runs: Sequence[Sequence[Timed]],
    shares: Sequence[tuple[float, ...]],
    corners: Sequence[int],
    chosen: Sequence[str],
) -> list[Fit]:
    """Fit with some of `_EXTRAS`; a variant without a share has the terms of its own."""
    rows = [
        [_row(run, corners, chosen, share) for run in own]
        for own, share in zip(runs, shares, strict=True)
    ]
    found = non_negative(list(chain(*rows)), [1.0] * sum(map(len, rows)))
    size = len(corners) + len(chosen)
    fits = []
    for own, share in zip(rows, shares, strict=True):
        terms = found[:size]
        for part in share:
            terms = [a + part * b for a, b in zip(terms, found[size:], strict=True)]
        slopes = terms[1 : len(corners)]
        heights = [terms[0]]
        for slope, (low, high) in zip(slopes, pairwise(corners), strict=True):
            heights.append(heights[-1] + slope * (high - low))
        error = max(abs(sum(a * b for a, b in zip(row, found, strict=True)) - 1) for row in own)
        more = dict(zip(chosen, terms[len(corners) :], strict=True))
        fits.append((StepTimes(tuple(corners), tuple(heights), slopes[-1], **more), error))
    return fits


def _row(
    run: Timed, corners: Sequence[int], chosen: Sequence[str], share: tuple[float, ...]
) -> list[float]:
    """Return what each term's coefficient contributes to a run's time, relative to that time."""
    total = [0.0] * (len(corners) + len(chosen))
    for new, sequences, attended, cached in run.steps:
        more = {"read": cached, "attended": attended, "sequence": sequences}
        parts = [*_line(corners, new), *(more[name] for name in chosen)]
        total = [a + b for a, b in zip(total, parts, strict=True)]
    parts = [part / run.seconds for part in total]
    return [scale * part for scale in (1.0, *share) for part in parts]


def _usual(steps: Sequence[Features]) -> int:
    """Return the most common number of new tokens; the largest on a tie."""
    counts = Counter(step[0] for step in steps)
    return max(counts, key=lambda new: (counts[new], new))


def _line(corners: Sequence[int], new: int) -> list[float]:
    """Return the constant, and the part of ``new`` in each piece; the last piece is open."""
    pieces = [max(0.0, min(new, high) - low) for low, high in pairwise(corners)]
    pieces[-1] += max(0, new - corners[-1])
    return [1.0, *pieces]


def read_measured(folders: Sequence[Path]) -> list[Measured]:
    """Read the vLLM variants from the records of one model, dense first.

    Args:
        folders: output folders of `sleb-serve bench` for one model on one machine.

    Raises:
        SlebError: there are no such records, or they are insufficient.
    """
    entries = [list(_entries(folder)) for folder in folders]
    try:
        return _variants(entries)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise SlebError(
            f"{', '.join(map(str, folders))}: records of another version ({type(error).__name__} "
            f"{first_line(error)}); run sleb-serve bench again"
        ) from error


def _variants(entries: Sequence[Sequence[Mapping[str, Any]]]) -> list[Measured]:
    models = {e["weights_sha256"] for run in entries for e in run if e["record"] == "setting"}
    if len(models) != 1:
        raise SlebError("the records are of several models, or of none; give those of one model")
    names: dict[str, int] = {}
    for entry in chain(*entries):
        if entry["record"] == "variant" and entry.get("backend") == "vllm":
            names.setdefault(entry["variant"], int(entry["blocks"]))
    if 0 not in names.values():
        raise SlebError("the records hold no dense model; run sleb-serve bench again")
    # One per size: comparison variants have other names but the same blocks.
    first = {blocks: name for name, blocks in reversed(names.items())}
    found = [_measured(first[blocks], blocks, entries) for blocks in sorted(first)]
    counts = [e.get("num_blocks") for run in entries for e in run if e["record"] == "setting"]
    return _together(found, counts[0])


def _together(
    found: Sequence[tuple[Measured, Sequence[Timed]]], blocks: int | None
) -> list[Measured]:
    """Fit all variants together if they ran the same steps and the fit is good enough."""
    alone = [own for own, _ in found]
    ran = {tuple(run.steps for run in runs) for _, runs in found}
    if blocks is None or len(found) < 2 or len(ran) > 1:
        return alone
    fits = fit_together([runs for _, runs in found], [1 - own.removed / blocks for own in alone])
    if max(error for _, error in fits) > max(_ACCEPTED, *(own.error for own in alone)):
        return alone
    return [
        replace(own, step=step, error=error) for own, (step, error) in zip(alone, fits, strict=True)
    ]


def _entries(folder: Path) -> Iterable[Mapping[str, Any]]:
    try:
        lines = (folder / RECORDS).read_bytes().splitlines()
    except OSError as error:
        raise SlebError(
            f"cannot read {folder / RECORDS}: {error.strerror}; give a folder that sleb-serve "
            f"bench wrote"
        ) from error
    for number, line in enumerate(lines, 1):
        entry = strict_json.any_object(strict_json.load(line), f"{folder / RECORDS}:{number}")
        if not isinstance(entry.get("record"), str):
            raise SlebError(
                f"{folder / RECORDS}:{number} is no record of this version; run sleb-serve bench "
                f"again"
            )
        yield entry


def _measured(
    name: str, blocks: int, entries: Sequence[Sequence[Mapping[str, Any]]]
) -> tuple[Measured, list[Timed]]:
    """Return a variant with a fit of its own, and its runs."""
    runs: list[Timed] = []
    kv_tokens: list[int] = []
    block = 1
    tokens, sequences = _DEFAULT_TOKENS, _DEFAULT_SEQUENCES
    for run in entries:
        own = [entry for entry in run if entry.get("variant") == name]
        workloads = _workloads(run)
        sizes = [e["kv_cache_tokens"] for e in own if e["record"] == "engine"]
        if not sizes:
            continue
        kv_tokens += sizes
        block = max(sizes) // max(e["kv_cache_blocks"] for e in own if e["record"] == "engine")
        (variant,) = (entry for entry in own if entry["record"] == "variant")
        arguments = variant["engine_arguments"]
        tokens = int(arguments.get("max_num_batched_tokens") or tokens)
        sequences = int(arguments.get("max_num_seqs") or sequences)
        for workload in workloads:
            times = [
                float(entry["elapsed_time"])
                for entry in own
                if entry["record"] == "sample"
                and entry["workload"] == workload.name
                and entry["round"]
            ]
            if times:
                steps = steps_of(workload, tokens, sequences, min(sizes))
                runs.append(Timed(steps, median(times)))
    if not runs:
        raise SlebError(f"the records hold no sample of {name}; run sleb-serve bench again")
    step, error = fit(runs)
    memory = min(kv_tokens)
    found = Measured(name, blocks, memory, block, tokens, sequences, step, len(runs), error)
    return found, runs


def _workloads(run: Sequence[Mapping[str, Any]]) -> list[Workload]:
    fields = Workload.__dataclass_fields__
    (setting,) = (entry for entry in run if entry["record"] == "setting")
    return [
        Workload(**{key: value for key, value in entry.items() if key in fields})
        for entry in setting["workloads"]
    ]
