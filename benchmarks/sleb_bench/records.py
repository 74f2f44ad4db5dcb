"""The raw records of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sleb_bench.files import RECORDS
from sleb_serve.utils.atomic_io import write_atomically


class Records:
    """The raw records of a run, saved regularly so that a failed run keeps them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: list[dict[str, Any]] = []

    def add(self, kind: str, values: Mapping[str, Any]) -> None:
        """Add a record."""
        self.entries.append({"record": kind, **values})

    def save(self) -> None:
        """Write all records."""
        lines = "".join(json.dumps(entry) + "\n" for entry in self.entries)
        write_atomically(self.folder / RECORDS, lines.encode())

    def measured(self) -> bool:
        """Return whether there is data for a report."""
        return any(
            entry["record"] in {SERVING, SLO}
            or (entry["record"] == "sample" and entry["round"] > 0)
            for entry in self.entries
        )


SERVING, SLO = "serving", "slo"
"""Workloads over HTTP: a ladder of loads, and a search for the highest rate that meets the SLO."""
