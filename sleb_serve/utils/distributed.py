"""Processes that share the work, started by ``accelerate launch`` or ``torchrun``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sleb_serve.errors import SlebError

_T = TypeVar("_T")


def _alone(values: list[Any]) -> list[Any]:
    return values


@dataclass(frozen=True)
class Ranks:
    """This process's place among those launched together.

    Attributes:
        index: its number; only process 0 prints and writes.
        count: number of processes.
        device: its device for scoring; None for all accelerators of this machine, or the CPU.
        gather: joins the lists of all processes in order, in every process.
    """

    index: int = 0
    count: int = 1
    device: Any = None
    gather: Callable[[list[Any]], list[Any]] = _alone

    def share(self, items: Sequence[_T]) -> Sequence[_T]:
        """Return this process's consecutive part of the items; sizes differ by at most one.

        Raises:
            SlebError: there are fewer items than processes.
        """
        if len(items) < self.count:
            raise SlebError(
                f"{len(items)} sequences cannot be shared by {self.count} processes; ask for more "
                f"`sequences` or launch fewer"
            )
        first, last = (len(items) * i // self.count for i in (self.index, self.index + 1))
        return items[first:last]


def is_first() -> bool:
    """Return whether this process prints and writes, without heavy imports."""
    return int(os.environ.get("RANK", "0")) == 0


def processes_here() -> int:
    """Return the number of launched processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def launched() -> Ranks:
    """Join the launched processes, as described by the environment."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState(cpu=not torch.accelerator.is_available())
    device = state.device if torch.accelerator.is_available() else None
    return Ranks(state.process_index, state.num_processes, device, gather_object)
