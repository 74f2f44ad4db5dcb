"""Memory of the search: the budget, the needs of the work, and a plan within the budget.

The budget covers weights, states and work on the scoring device, but not Python and its libraries.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleb_serve.errors import SlebError
from sleb_serve.utils.sizes import format_size

_DEFAULT_SHARE = 0.8
_LIBRARIES = 40 << 20
"""Observed library allocations: kernels, the tokenizer, thread buffers."""
_M_MMAP_THRESHOLD = -3
"""From glibc's malloc.h."""
_GPU_TOKENS = 1 << 15
"""Tokens per layer call, to fill a GPU. A CPU runs state by state, which is as fast and makes
results independent of the batch to the last bit.
"""
USED_SHARE = 0.85
"""Usable share of the budget; the rest covers allocators and library internals."""


class BudgetError(SlebError):
    """The budget is too small for the work."""


@dataclass(frozen=True)
class Plan:
    """Division of a sweep into pieces.

    Attributes:
        sequences: sequences with states held at once.
        chunk: states that pass through a layer at once.
        snapshots: states that may be kept between steps, over all sequences.
        finals: candidates with final states kept until the step is decided.
    """

    sequences: int
    chunk: int
    snapshots: int
    finals: int


@dataclass(frozen=True)
class Needs:
    """Bytes that pieces of the work need; see `make_plan`."""

    weights: int
    state: int
    layer: int
    head: int


def default_budget() -> int:
    """Return four fifths of the free memory on the scoring device."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return int(_DEFAULT_SHARE * torch.cuda.mem_get_info()[0])
    free = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - psutil.Process().memory_info().rss)
    return int(_DEFAULT_SHARE * free)


def give_back_freed() -> None:
    """Make glibc return the memory of freed tensors to the system.

    By default its heap keeps it, and fragmentation by long-lived states was seen to double the
    memory in use. This costs up to a third of a CPU's speed.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)


def chunk_for(kind: str, length: int) -> int:
    """Return how many states of a length pass through a layer at once on a device type."""
    return 1 if kind == "cpu" else max(1, _GPU_TOKENS // length)


def make_plan(
    budget: int,
    needs: Needs,
    *,
    sequences: int,
    forks: int,
    best_chunk: int,
    streamed: bool,
    extra: int = 0,
) -> Plan:
    """Divide a budget.

    One sequence's states, the base's and one per fork, and the work on one of them must fit. The
    rest goes, in this order, to: the states of all sequences, if weights are streamed, so that each
    is read once per step; larger chunks; two finalists; snapshots.

    Args:
        budget: bytes for everything in `needs`.
        needs: bytes of the resident weights, of one state, and of the work of a layer and of the
            head on one state, beyond the state itself.
        sequences: number of sequences.
        forks: number of candidates in the first step.
        best_chunk: states per chunk beyond which there is no gain.
        streamed: whether layers' weights come from disk.
        extra: additional states to hold.

    Raises:
        BudgetError: the budget is too small; the message gives the minimum.
    """
    usable = int(USED_SHARE * budget) - _LIBRARIES
    group = (forks + 2) * needs.state
    finals = (2 * sequences + extra) * needs.state
    least = needs.weights + group + max(needs.layer, needs.head) + finals
    if least > usable:
        raise BudgetError(
            f"memory_budget={format_size(budget)} is too small: weights of "
            f"{format_size(needs.weights)} and one sequence's states with the work on them need "
            f"{format_size((least + _LIBRARIES) / USED_SHARE)}; give that, or a smaller "
            f"`sequence_length`"
        )
    rest = usable - least
    at_once = 1
    if streamed:
        at_once = min(sequences, 1 + rest // group)
        rest -= (at_once - 1) * group
    chunk = min(best_chunk, 1 + rest // max(1, 2 * needs.layer))
    rest -= (chunk - 1) * needs.layer
    more = min(forks - 2, rest // 4 // (sequences * needs.state)) if forks > 2 else 0
    rest -= more * sequences * needs.state
    return Plan(at_once, chunk, rest // needs.state, 2 + more)


def peak_bytes(work: Callable[[], Any]) -> int:
    """Return the peak bytes of tensors created by `work`, on any device."""
    from torch import Tensor
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Watch(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.given: set[int] = set()
            self.made: dict[int, tuple[StorageWeakRef, int]] = {}
            self.peak = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor):
                    pointer = tensor.untyped_storage()._cdata
                    if pointer not in self.made:
                        self.given.add(pointer)
            result = func(*args, **(kwargs or {}))
            self.made = {k: v for k, v in self.made.items() if not v[0].expired()}
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    storage = tensor.untyped_storage()
                    if storage._cdata not in self.given:
                        self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self.peak = max(self.peak, sum(size for _, size in self.made.values()))
            return result

    with Watch() as watch:
        work()
    return int(watch.peak)
