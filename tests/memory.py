"""Memory use of a command, as counted by Linux."""

from __future__ import annotations

import ctypes
from pathlib import Path

from sleb_serve.cli.main import main


def status(key: str) -> int:
    """A size in /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def measure_memory(first: list[str], second: list[str], output: Path) -> None:
    """For a fork: how many bytes the second command's peak is above what the first one left."""
    assert main(first) == 0  # what libraries load and allocate once
    # What the heap holds free would be taken for nothing.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
    before = status("VmRSS")
    assert main(second) == 0
    output.write_text(str(status("VmHWM") - before))
