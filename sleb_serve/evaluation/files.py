"""Files of an evaluation: atomic writes, and strict reading to resume."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sleb_serve.errors import SlebError, first_line
from sleb_serve.utils import strict_json
from sleb_serve.utils.atomic_io import check_writable, is_stream, write_atomically
from sleb_serve.utils.limited import read_limited
from sleb_serve.utils.outputs import Output, object_with

_REPORT = object_with("an evaluation's report", "model", "settings", "results")
_THEIRS = object_with("results of lm-eval", "results", "configs")
_MAX_BYTES = 64 << 20
_MEASURES = ("perplexity", "agreement", "calibration_error", "answers")
Results = dict[tuple[int, str | None], dict[str, Any]]
"""Results by number of blocks and pruning digest."""


def outputs_of(output: Path | None, theirs: Sequence[int]) -> list[Output]:
    """List an evaluation's output files, including lm-eval's own results, without the plot."""
    if output is None:
        return []
    check_writable(output)
    beside = () if is_stream(output) else theirs
    return [(output, _REPORT), *((_theirs_path(output, blocks), _THEIRS) for blocks in beside)]


def earlier_results(path: Path, model: object, settings: object) -> Results:
    """Read the results of a report with the same model and settings.

    Raises:
        SlebError: it cannot be read, or belongs to another evaluation.
    """
    try:
        report = strict_json.any_object(strict_json.load(read_limited(path, _MAX_BYTES)), "it")
        results = results_of(report)
    except (OSError, SlebError) as error:
        why = strict_json.without_advice(error) if isinstance(error, SlebError) else error
        raise SlebError(
            f"cannot resume from {path}: {first_line(error) if why is error else why}; omit "
            "`resume` to start over"
        ) from error
    if (report.get("model"), report.get("settings")) != (model, settings):
        raise SlebError(
            f"{path} is of another evaluation (model or settings differ); give another `output`, "
            f"or omit `resume` to start over"
        )
    return results


def results_of(report: Mapping[str, Any]) -> Results:
    """Parse the results of a report, also from a manifest.

    Raises:
        SlebError: it does not have the format of an evaluation.
    """
    entries = strict_json.list_(report.get("results"), "results")
    return dict(_result(entry, f"results[{i}]") for i, entry in enumerate(entries))


def _result(value: object, where: str) -> tuple[tuple[int, str | None], dict[str, Any]]:
    entry = strict_json.any_object(value, where)
    blocks = strict_json.integer(entry.get("blocks"), f"{where}.blocks", 0, 1 << 31)
    pruning = entry.get("pruning")
    if pruning is not None:
        pruning = strict_json.sha256(pruning, f"{where}.pruning")
    tasks = strict_json.any_object(entry.get("tasks", {}), f"{where}.tasks")
    return (blocks, pruning), {
        **{name: _numbers(entry.get(name, {}), f"{where}.{name}") for name in _MEASURES},
        "tasks": {name: _metrics(found, f"{where}.tasks") for name, found in tasks.items()},
    }


def _metrics(value: object, where: str) -> Mapping[str, float]:
    found = _numbers(value, where)
    if all("_stderr" in name for name in found):
        raise SlebError(f"{where} has a task without a metric")
    return found


def _numbers(value: object, where: str) -> Mapping[str, float]:
    found = strict_json.any_object(value, where)
    return {name: strict_json.number(entry, where) for name, entry in found.items()}


def write_report(path: Path | None, report: Mapping[str, Any]) -> None:
    """Write a report, if there is an output."""
    if path is not None:
        write_atomically(path, (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())


def write_theirs(path: Path | None, blocks: int, results: Mapping[str, Any]) -> None:
    """Write lm-eval's own results next to ours, in the format of `lm_eval --output_path`."""
    if path is not None:
        text = json.dumps(results, indent=2, default=str, ensure_ascii=False)
        write_atomically(_theirs_path(path, blocks), text.encode())


def _theirs_path(path: Path, blocks: int) -> Path:
    return path.with_name(f"{path.stem}.lm-eval-{blocks}.json")
