"""Several processes that share the work, started by ``accelerate launch`` or ``torchrun``."""

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
    """This process among those that were launched together.

    Attributes:
        index: its number; process 0 alone prints and writes.
        count: how many there are.
        device: what it scores on; None for all accelerators of this machine, or the CPU.
        gather: lists of all processes, joined in their order, in every process.
    """

    index: int = 0
    count: int = 1
    device: Any = None
    gather: Callable[[list[Any]], list[Any]] = _alone

    def share(self, items: Sequence[_T]) -> Sequence[_T]:
        """This process's part of the items: consecutive, one more or less than the others'.

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
    """Whether this process prints and writes, before anything heavy is imported."""
    return int(os.environ.get("RANK", "0")) == 0


def processes_here() -> int:
    """How many processes of the launch run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def launched() -> Ranks:
    """The processes that were launched together, as the environment says; joins them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState(cpu=not torch.accelerator.is_available())
    device = state.device if torch.accelerator.is_available() else None
    return Ranks(state.process_index, state.num_processes, device, gather_object)
