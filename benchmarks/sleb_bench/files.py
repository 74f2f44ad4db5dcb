"""A run's folder with records and report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sleb_bench.markdown import to_markdown
from sleb_bench.page import to_html
from sleb_bench.pictures import pictures
from sleb_bench.report import make_report
from sleb_serve.errors import SlebError, first_line
from sleb_serve.utils.atomic_io import write_atomically
from sleb_serve.utils.limited import read_limited
from sleb_serve.utils.outputs import locked

RECORDS = "records.jsonl"
SCRATCH = ".exported-"
"""Name prefix of temporary folders with exported checkpoints."""
_MAX_BYTES = 1 << 30


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Read the raw records of a run.

    Raises:
        SlebError: there are none, or they are invalid.
    """
    path = folder / RECORDS if folder.is_dir() else folder
    try:
        lines = read_limited(path, _MAX_BYTES).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SlebError(
            f"cannot read {path}: {first_line(error)}; give a folder that `sleb-serve bench` wrote"
        ) from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or "record" not in record:
            raise SlebError(f"{path}, line {number}: not a record; was the file changed?")
        records.append(record)
    return records


@contextmanager
def claimed_folder(
    folder: Path,
    force: bool,
    kind: str = "a benchmark's",
    check: Callable[[Path], object] | None = None,
) -> Iterator[None]:
    """Claim a folder that is new, empty, or from another run.

    Args:
        folder: the folder.
        force: also allow a folder with other files.
        kind: the kind of run that the folder may belong to.
        check: raises `SlebError` or `OSError` for a folder of another kind; None to check records.

    Raises:
        SlebError: it cannot be created, has other content, or another run writes there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise SlebError(f"cannot make the folder {folder}: {first_line(error)}") from error
    if there and not force:
        try:
            (check or read_records)(folder)
        except (SlebError, OSError) as error:
            raise SlebError(
                f"{folder} holds other files than {kind}, which are kept; give another output, or "
                f"`force` to write among them"
            ) from error
    with locked(folder / ".lock", folder):
        for scratch in folder.glob(f"{SCRATCH}*"):
            shutil.rmtree(scratch, ignore_errors=True)
        yield


def report_of(folder: Path) -> dict[str, Any]:
    """Build the report of a run from its records.

    Raises:
        SlebError: the records are missing or invalid.
    """
    records = read_records(folder)
    try:
        return make_report(records)
    except (LookupError, TypeError, StopIteration, ZeroDivisionError, ValueError) as error:
        raise SlebError(
            f"{folder}: the records make no report ({type(error).__name__}: {first_line(error)}); "
            f"were they written by another version?"
        ) from error


def write_report(folder: Path) -> dict[str, Any]:
    """Write a run's report from its records: JSON, Markdown, plots, one page.

    Raises:
        SlebError: as for `report_of`, or a file cannot be written.
    """
    report = report_of(folder)
    folder = folder if folder.is_dir() else folder.parent
    drawn = pictures(report)
    write_atomically(folder / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    write_atomically(folder / "report.md", to_markdown(report).encode())
    for name, picture in drawn.items():
        write_atomically(folder / f"{name}.png", picture)
    write_atomically(folder / "report.html", to_html(report, drawn).encode())
    return report


def write_texts(path: Path, texts: Iterable[str]) -> None:
    """Write a file of texts for `heal` and the other commands, one JSON object per line."""
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    write_atomically(path, rows.encode())
