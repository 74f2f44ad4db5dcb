"""The selector's memory: a budget, what a piece of work takes, and a plan that stays inside.

The budget is for weights, states and work on the device that scores, beyond what Python and its
libraries take for themselves.
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
"""What libraries were seen to allocate on the way: kernels, the tokenizer, threads' buffers."""
_M_MMAP_THRESHOLD = -3
"""From glibc's malloc.h."""
_GPU_TOKENS = 1 << 15
"""Tokens that go through a layer at once, to fill a GPU. A CPU takes state by state: it is as fast,
and what a state becomes does not depend on its neighbours in a batch, not even in the last bit."""
USED_SHARE = 0.85
"""Of the budget; the rest is for what allocators hold back and libraries use inside."""


class BudgetError(SlebError):
    """A budget in which the work cannot be done."""


@dataclass(frozen=True)
class Plan:
    """How a sweep is cut into pieces.

    Attributes:
        sequences: sequences whose states are held at once.
        chunk: states that go through a layer at once.
        snapshots: states that may be kept from step to step, over all sequences.
        finals: candidates whose states behind the last layer are kept until the step is decided.
    """

    sequences: int
    chunk: int
    snapshots: int
    finals: int


@dataclass(frozen=True)
class Needs:
    """Bytes that pieces of the work take: see `make_plan`."""

    weights: int
    state: int
    layer: int
    head: int


def default_budget() -> int:
    """Four fifths of what is free on the device that scores."""
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
    """Make the C library (glibc) give tensors' memory back to the system once they are freed.

    By default its heap keeps it, and states that stay among temporaries that go leave gaps: up to
    twice the memory in use, as seen here. It costs up to a third of a CPU's speed.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)


def chunk_for(kind: str, length: int) -> int:
    """How many states of so many tokens go through a layer at once, on a kind of device."""
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

    What must fit is one sequence's states, the base's and one for each fork, and the work on one of
    them. Then come: the states of all sequences, if weights are streamed, so that each is read once
    a step; larger chunks; two finalists; snapshots.

    Args:
        budget: bytes for everything in `needs`.
        needs: bytes of the weights that are held, of one state, and of the work of a layer and of
            the head on one state, beyond the state itself.
        sequences: how many there are.
        forks: candidates of the first step.
        best_chunk: states a chunk beyond which nothing is gained.
        streamed: whether layers' weights come from disk.
        extra: states that are held besides.

    Raises:
        BudgetError: the budget is less than what must fit; the message says how much that is.
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
    """The most that tensors made by `work` hold at any time, in bytes, on whatever device."""
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
