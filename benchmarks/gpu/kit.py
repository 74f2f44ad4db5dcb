"""Common parts of the kit's steps: folders and results."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stepping import append

_MODEL_BYTES = 40 << 30
"""Minimum size of a memory file system for a model, its export and logs."""


@dataclass(frozen=True)
class Kit:
    """The environment of a step.

    Attributes:
        step: its name.
        output: folder for the results.
        tiny: whether to use tiny shapes for a CPU.
        errors: errors of failed parts.
    """

    step: str
    output: Path
    tiny: bool
    errors: list[str] = field(default_factory=list)

    @property
    def work(self) -> Path:
        """Return the folder for models and logs, in memory if there is enough."""
        shm = Path("/dev/shm")
        if self.tiny:
            return self.output / "work"
        roomy = shm.is_dir() and shutil.disk_usage(shm).total > _MODEL_BYTES
        return (shm if roomy else Path("/tmp")) / "sleb-gpu"

    def tell(self, what: str, **values: Any) -> None:
        """Write one result line immediately."""
        append(self.output, {"record": "result", "step": self.step, "what": what, **values})

    @contextmanager
    def telling(self, what: str, **about: Any) -> Iterator[dict[str, Any]]:
        """Provide a result to fill in; record an exception in it, and continue the step."""
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
        """Record a part of the step that cannot run here."""
        self.tell(what, skipped=why)


def on_gpu() -> bool:
    """Return whether torch sees a GPU."""
    import torch

    return bool(torch.cuda.is_available())


def synchronize() -> None:
    """Wait for the GPU, if any, before reading a clock."""
    import torch

    if on_gpu():
        torch.cuda.synchronize()


def engine_arguments() -> dict[str, Any]:
    """Return extra ``vllm.LLM`` arguments for every engine from SLEB_ENGINE_ARGS, as JSON."""
    found: dict[str, Any] = json.loads(os.environ.get("SLEB_ENGINE_ARGS", "{}"))
    return found


def sleb_serve(*arguments: str) -> list[str]:
    """Return a command line with this interpreter."""
    return [sys.executable, "-m", "sleb_serve.cli", *arguments]


def environment(output: Path, tiny: bool) -> Mapping[str, str]:
    """Return every step's environment: no network, one process per engine."""
    found = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(Kit("", output, tiny).work / "vllm-cache"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    if find_spec("flashinfer") is None:
        # vLLM uses its sampler on a GPU without looking for the package.
        found["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    return found | ({"VLLM_CPU_KVCACHE_SPACE": "1"} if tiny else {})


def spread(count: int, removed: int) -> list[int]:
    """Choose `removed` of `count` blocks, except the first and the last, in unsorted order.

    Speed does not depend on the choice; another step checks which blocks are removed.
    """
    inner: Sequence[int] = range(1, count - 1)
    found = sorted({inner[i * len(inner) // removed] for i in range(removed)})
    return [*found[1::2], *found[::2]]
