"""Conditions during a turn: other processes, stolen time, load, clock."""

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
_DISTURBED_TICKS = 3
"""A short turn has so few clock ticks that one more or less is over 5 %."""


@dataclass(frozen=True)
class Conditions:
    """Conditions during one turn; None for unknown values.

    Attributes:
        others: share of all CPU time used by other processes.
        steal: share of all CPU time given to other machines by the hypervisor.
        load: one-minute load average at its end.
        mhz: mean CPU clock at its end.
        disturbed: whether `others` and `steal` exceed 5 % of the machine, and three clock ticks.
    """

    others: float | None
    steal: float | None
    load: float | None
    mhz: float | None
    disturbed: bool


class Watch:
    """Measures CPU time and conditions from its creation."""

    def __init__(self) -> None:
        # Finding children takes milliseconds, which must not count.
        children = _children_seconds()
        self._begin, self._ticks = time.perf_counter(), _ticks()
        self._own = time.process_time() + children

    def read(self) -> tuple[float, Conditions]:
        """Return CPU-seconds of this process and its children, and the conditions."""
        own, ticks, now = time.process_time(), _ticks(), time.perf_counter()
        own += _children_seconds() - self._own
        others = steal = None
        limit = _DISTURBED_SHARE
        if ticks is not None and self._ticks is not None:
            busy, stolen = (
                (new - old) / os.sysconf("SC_CLK_TCK")
                for new, old in zip(ticks[:2], self._ticks[:2], strict=True)
            )
            whole = (now - self._begin) * ticks[2]
            # Ticks are coarse, so differences may be slightly negative.
            others, steal = max(0.0, busy - own) / whole, stolen / whole
            limit = max(limit, _DISTURBED_TICKS / os.sysconf("SC_CLK_TCK") / whole)
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        elsewhere = (others or 0.0) + (steal or 0.0) > limit
        found = Conditions(_rounded(others), _rounded(steal), _rounded(load), _mhz(), elsewhere)
        return own, found


def disturbed(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Return whether a turn of a pair was disturbed, or their clocks differ by more than 5 %.

    Args:
        one: recorded `Conditions` of one turn, or None.
        other: those of the other turn.
    """
    turns = [turn for turn in (one, other) if turn is not None]
    if any(turn["disturbed"] for turn in turns):
        return True
    clocks = [turn["mhz"] for turn in turns if turn["mhz"]]
    return len(clocks) == 2 and max(clocks) > (1 + _DISTURBED_CLOCK) * min(clocks)


def _ticks() -> tuple[int, int, int] | None:
    """Return the busy and stolen clock ticks of all CPUs, and the number of CPUs."""
    try:
        lines = _STAT.read_text().splitlines()
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, lines[0].split()[1:9])
    processors = sum(line.startswith("cpu") for line in lines) - 1
    return user + nice + system + irq + softirq, steal, processors


def _children_seconds() -> float:
    """Return the CPU time of this process's live children."""
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
