"""What every step of the kit needs: where things lie, and how a result is told."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepping import append

_MODEL_BYTES = 40 << 30
"""A memory file system smaller than this is not used: a model, its export and logs lie there."""


@dataclass(frozen=True)
class Kit:
    """One step's surroundings.

    Attributes:
        step: its name.
        output: gets the results.
        tiny: tiny shapes, as a CPU can do them.
        errors: of what failed while the step went on.
    """

    step: str
    output: Path
    tiny: bool
    errors: list[str] = field(default_factory=list)

    @property
    def work(self) -> Path:
        """For models and logs: in memory if there is enough, which is faster than a disk."""
        shm = Path("/dev/shm")
        if self.tiny:
            return self.output / "work"
        roomy = shm.is_dir() and shutil.disk_usage(shm).total > _MODEL_BYTES
        return (shm if roomy else Path("/tmp")) / "sleb-gpu"

    def tell(self, what: str, **values: Any) -> None:
        """One result, a line at once."""
        append(self.output, {"record": "result", "step": self.step, "what": what, **values})

    @contextmanager
    def telling(self, what: str, **about: Any) -> Iterator[dict[str, Any]]:
        """A result that is filled in; an exception becomes part of it, and the step goes on."""
        found: dict[str, Any] = {}
        begin = time.monotonic()
        try:
            yield found
        except Exception as error:
            import traceback

            traceback.print_exc()
            found["error"] = f"{type(error).__name__}: {error}"[:600]
            self.errors.append(found["error"])
        self.tell(what, **about, **found, seconds=round(time.monotonic() - begin, 2))

    def skip(self, what: str, why: str) -> None:
        """A part of the step that cannot be done here."""
        self.tell(what, skipped=why)


def on_gpu() -> bool:
    """Whether torch sees a GPU."""
    import torch

    return bool(torch.cuda.is_available())


def synchronize() -> None:
    """Wait for the GPU, if there is one, before a clock is read."""
    import torch

    if on_gpu():
        torch.cuda.synchronize()


def engine_arguments() -> dict[str, Any]:
    """More arguments of ``vllm.LLM`` for every engine, from SLEB_ENGINE_ARGS, as JSON."""
    found: dict[str, Any] = json.loads(os.environ.get("SLEB_ENGINE_ARGS", "{}"))
    return found


def sleb_serve(*arguments: str) -> list[str]:
    """The command line of this interpreter."""
    return [sys.executable, "-m", "sleb_serve.cli", *arguments]


def environment(output: Path, tiny: bool) -> Mapping[str, str]:
    """Variables of every step: no network, one process an engine."""
    found = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(Kit("", output, tiny).work / "vllm-cache"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    return found | ({"VLLM_CPU_KVCACHE_SPACE": "1"} if tiny else {})


def spread(count: int, removed: int) -> list[int]:
    """`removed` of `count` blocks, the first and the last left alone, in an order that is no sort.

    Speed does not depend on which blocks go; that the right ones go is another step's.
    """
    inner: Sequence[int] = range(1, count - 1)
    found = sorted({inner[i * len(inner) // removed] for i in range(removed)})
    return [*found[1::2], *found[::2]]
