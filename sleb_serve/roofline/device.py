"""Measured peaks of this machine, with plain kernels."""

from __future__ import annotations

import time
from collections.abc import Callable

from sleb_serve.roofline.gpu import HERE, Gpu

_SIZE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices: on a GPU the product must take much longer than its launch."""
_TRIED_SIZE = 256
"""Size of the matrices for choosing a CPU's dtype: emulated, a large product takes a minute."""
_BUFFER_BYTES = 512 << 20
_REPEATS = 5


def device_here() -> Gpu:
    """Measure the rates of a matrix product and of reading memory; the best of several.

    The product is in bfloat16, or on a CPU that emulates it in float32.
    """
    import torch

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    size = _SIZE[device]
    buffer = torch.ones(_BUFFER_BYTES // 4, dtype=torch.float32, device=device)

    def best(work: Callable[[], object]) -> float:
        times = []
        for _ in range(_REPEATS + 1):
            begin = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return min(times[1:])

    def product(size: int, dtype: torch.dtype) -> float:
        matrix = torch.ones(size, size, dtype=dtype, device=device)
        return best(lambda: matrix @ matrix)

    dtype = torch.bfloat16
    if not cuda:
        dtype = min((dtype, torch.float32), key=lambda tried: product(_TRIED_SIZE, tried))
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else 0
    if not cuda:
        import psutil

        memory = psutil.virtual_memory().total
    flops = 2 * size**3 / product(size, dtype)
    bandwidth = _BUFFER_BYTES / best(buffer.sum)
    # Ranks on one CPU communicate through its memory.
    return Gpu(HERE, flops, bandwidth, memory, bandwidth / 2)
