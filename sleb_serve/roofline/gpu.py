"""GPUs with their data sheet values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from sleb_serve.errors import SlebError

HERE = "here"
MEMORY_USED = 0.9
"""Usable share of a GPU's memory, as vLLM's gpu_memory_utilization."""


@dataclass(frozen=True)
class Gpu:
    """Peak rates of one device: 16-bit flop/s (dense), memory and link bytes/s, memory bytes.

    ``latency`` is the seconds of one all-reduce.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    link: float
    latency: float = 10e-6

    def slowed(self, compute: float, memory: float) -> Gpu:
        """Scale the peaks by the shares that kernels reach."""
        return replace(self, flops=self.flops * compute, bandwidth=self.bandwidth * memory)


# From NVIDIA's data sheets; links are one direction of NVLink, or of PCIe 4.0 x16.
GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        gpu.name: gpu
        for gpu in (
            Gpu("A100-40G", 312e12, 1555e9, 40e9, 300e9),
            Gpu("A100-80G", 312e12, 2039e9, 80e9, 300e9),
            Gpu("H100-80G", 989e12, 3350e9, 80e9, 450e9),
            Gpu("H200", 989e12, 4800e9, 141e9, 450e9),
            Gpu("L40S", 362e12, 864e9, 48e9, 32e9),
            Gpu("L4", 121e12, 300e9, 24e9, 32e9),
        )
    }
)


def gpu_named(name: str) -> Gpu:
    """Return a GPU from `GPUS`.

    Raises:
        SlebError: the name is unknown.
    """
    if name not in GPUS:
        raise SlebError(f"gpu={name} is not one of {', '.join(GPUS)}")
    return GPUS[name]
