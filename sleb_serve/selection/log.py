"""The search log, JSON lines next to the manifest with every candidate's loss, used to resume.

The first line describes the search; then each step has one line per candidate and one for the best:
the blocks removed before, and its rivals, those within two standard errors. In a greedy search, the
best block is removed. A loss with ``"exact": false`` is a lower bound, or in a fast search an
estimate. Each step is appended and synced at once, so a killed search loses at most one step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sleb_serve.errors import SlebError, first_line
from sleb_serve.manifest.schema import perplexity_of
from sleb_serve.selection.search import Step
from sleb_serve.utils import strict_json
from sleb_serve.utils.atomic_io import write_atomically
from sleb_serve.utils.limited import read_limited
from sleb_serve.utils.outputs import beginning_with

_MAX_BYTES = 1 << 30
LOG = beginning_with("the log of a search", rb'\{"search": ')


class SearchLog:
    """The JSON-lines file of one search.

    Args:
        path: the file; None keeps the log only in memory.
        subject: the inputs of the search; a log with another subject is not resumed.
        writes: whether this process writes the file; the others only read it.
    """

    def __init__(
        self, path: Path | None, subject: Mapping[str, Any], *, writes: bool = True
    ) -> None:
        self.path = path or Path()
        self._writes = writes and path is not None
        self._subject = json.loads(json.dumps(subject))
        self.dense_loss: float | None = None
        self.steps: list[Step] = []

    def start(self) -> None:
        """Begin a new log, replacing an earlier one."""
        if self._writes:
            write_atomically(self.path, _line({"search": self._subject}))

    def resume(self) -> None:
        """Load the finished steps of an earlier log; without one, start a new log.

        Raises:
            SlebError: the log belongs to another search, or is damaged before its end.
        """
        if not self.path.exists():
            self.start()
            return
        try:
            lines = read_limited(self.path, _MAX_BYTES).split(b"\n")
        except OSError as error:
            raise SlebError(
                f"cannot resume from {self.path}: {first_line(error)}; re-run without `resume` to "
                "start over"
            ) from error
        whole, torn = lines[:-1], lines[-1]  # an incomplete last line was cut off by a kill
        finished: list[bytes] = []
        dense: float | None = None
        pending: list[tuple[int, float, bool]] = []
        for number, raw in enumerate(whole, 1):
            where = f"{self.path} line {number}"
            try:
                entry = strict_json.any_object(strict_json.load(raw), "entry")
                if number == 1:
                    self._check_subject(entry)
                elif "dense" in entry:
                    dense = strict_json.number(entry["dense"], "dense")
                    continue
                elif "candidate" in entry:
                    block = strict_json.integer(entry["candidate"], "candidate", 0, 1 << 31)
                    exact = entry.get("exact", True) is True
                    pending.append((block, strict_json.number(entry["loss"], "loss"), exact))
                    continue
                else:
                    strict_json.integer(entry["removed"], "removed", 0, 1 << 31)
                    after, rivals = _blocks(entry, "after"), _blocks(entry, "rivals")
                    blocks, losses, exacts = zip(*pending, strict=True)
                    self.steps.append(Step(after, blocks, losses, exacts, rivals))
                    self.dense_loss, pending = dense, []
            except (SlebError, KeyError, ValueError) as error:
                raise SlebError(
                    f"{where} cannot be resumed from: {error}; re-run without `resume` to start "
                    "over"
                ) from error
            finished = whole[:number]
        if self._writes and (torn or len(finished) != len(whole)):
            write_atomically(self.path, b"".join(entry + b"\n" for entry in finished))
        if not finished:
            self.start()

    def append(self, step: Step, dense_loss: float | None = None) -> None:
        """Append a finished step, preceded by the dense model's loss for the first one."""
        entries: list[Mapping[str, Any]] = []
        if dense_loss is not None:
            self.dense_loss = dense_loss
            entries.append({"dense": dense_loss, "perplexity": perplexity_of(dense_loss)})
        number = len(self.steps) + 1
        entries += [
            {"step": number, "candidate": block, "loss": loss, "perplexity": perplexity_of(loss)}
            | ({} if exact else {"exact": False})
            for block, loss, exact in zip(step.candidates, step.losses, step.exact, strict=True)
        ]
        last: dict[str, Any] = {"step": number, "removed": step.block, "loss": step.loss}
        last |= {"after": list(step.removed)} if step.removed else {}
        entries.append(last | ({"rivals": list(step.rivals)} if step.rivals else {}))
        self.steps.append(step)
        if not self._writes:
            return
        try:
            with self.path.open("ab") as file:
                file.write(b"".join(_line(entry) for entry in entries))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise SlebError(
                f"cannot write {self.path}: {first_line(error)}; earlier steps are kept, "
                f"free disk space and re-run with `resume`"
            ) from error

    def _check_subject(self, entry: Mapping[str, Any]) -> None:
        found = entry.get("search")
        if not isinstance(found, dict):
            raise SlebError("it is not a search log")
        for key in (*self._subject, *(key for key in found if key not in self._subject)):
            if found.get(key) != self._subject.get(key):
                raise SlebError(
                    f"it belongs to another search, whose {_difference(found, self._subject, key)}"
                )


def _blocks(entry: Mapping[str, Any], key: str) -> tuple[int, ...]:
    blocks = strict_json.list_(entry.get(key, []), key)
    return tuple(strict_json.integer(block, key, 0, 1 << 31) for block in blocks)


def log_path(output: Path, sample: int = 0) -> Path:
    """Return the path of the search log for manifest `output` and a sample of the text."""
    return output.with_name(f"{output.name}{f'.sample{sample}' if sample else ''}.search.jsonl")


def _difference(found: Mapping[str, Any], subject: Mapping[str, Any], key: str) -> str:
    theirs, ours = found.get(key), subject.get(key)
    if isinstance(theirs, dict) and isinstance(ours, dict):
        inner = next(name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name))
        key, theirs, ours = f"{key}.{inner}", theirs.get(inner), ours.get(inner)
    return f"{strict_json.short(key)[1:-1]} was {_shown(theirs)}, not {_shown(ours)}"


def _shown(value: object) -> str:
    return value if isinstance(value, str) and len(value) < 80 else strict_json.short(value)


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, allow_nan=False).encode() + b"\n"
