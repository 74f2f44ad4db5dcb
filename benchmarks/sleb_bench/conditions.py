"""What else the machine did during a turn: other processes, stolen time, load, clock."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

_STAT, _CLOCKS = Path("/proc/stat"), Path("/sys/devices/system/cpu")
_DISTURBED_SHARE = 0.05
_DISTURBED_CLOCK = 0.05


@dataclass(frozen=True)
class Conditions:
    """During one turn; None where the machine does not say.

    Attributes:
        others: share of all processors' time that other processes used.
        steal: share that the hypervisor gave to other machines.
        load: the load average of the last minute at its end.
        mhz: mean clock of the processors at its end.
        disturbed: over 5 % of the machine went elsewhere: `others` and `steal`.
    """

    others: float | None
    steal: float | None
    load: float | None
    mhz: float | None
    disturbed: bool


class Watch:
    """Begins when it is made; tells of processor time and conditions since then."""

    def __init__(self) -> None:
        # Looking for children takes milliseconds, which must not count.
        children = _children_seconds()
        self._begin, self._ticks = time.perf_counter(), _ticks()
        self._own = time.process_time() + children

    def read(self) -> tuple[float, Conditions]:
        """Processor seconds of this process and those it started, and what else went on."""
        own, ticks, now = time.process_time(), _ticks(), time.perf_counter()
        own += _children_seconds() - self._own
        others = steal = None
        if ticks is not None and self._ticks is not None:
            busy, stolen = (
                (new - old) / os.sysconf("SC_CLK_TCK")
                for new, old in zip(ticks[:2], self._ticks[:2], strict=True)
            )
            whole = (now - self._begin) * ticks[2]
            # Ticks are coarse: what is left of them may be a little below zero.
            others, steal = max(0.0, busy - own) / whole, stolen / whole
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        elsewhere = (others or 0.0) + (steal or 0.0) > _DISTURBED_SHARE
        found = Conditions(_rounded(others), _rounded(steal), _rounded(load), _mhz(), elsewhere)
        return own, found


def disturbed(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Whether either turn of a pair was disturbed, or their clocks differ by more than 5 %.

    Args:
        one: `Conditions` of a pair's one turn, as recorded; None where there are none.
        other: of the other.
    """
    turns = [turn for turn in (one, other) if turn is not None]
    if any(turn["disturbed"] for turn in turns):
        return True
    clocks = [turn["mhz"] for turn in turns if turn["mhz"]]
    return len(clocks) == 2 and max(clocks) > (1 + _DISTURBED_CLOCK) * min(clocks)


def _ticks() -> tuple[int, int, int] | None:
    """Clock ticks that all processors worked, and that were stolen; how many processors."""
    try:
        lines = _STAT.read_text().splitlines()
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, lines[0].split()[1:9])
    processors = sum(line.startswith("cpu") for line in lines) - 1
    return user + nice + system + irq + softirq, steal, processors


def _children_seconds() -> float:
    """Of the processes that this one started and that live."""
    seconds = 0.0
    with contextlib.suppress(ImportError):
        import psutil

        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                times = child.cpu_times()
                seconds += times.user + times.system
    return seconds


def _mhz() -> float | None:
    clocks = []
    for file in _CLOCKS.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"):
        try:
            clocks.append(int(file.read_text()) / 1000)
        except (OSError, ValueError):
            continue
    return _rounded(fmean(clocks)) if clocks else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
