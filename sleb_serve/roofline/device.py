"""Measured peaks of this machine, with plain kernels."""

from __future__ import annotations

import time
from collections.abc import Callable

from sleb_serve.roofline.gpu import HERE, Gpu

_SIZE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices: on a GPU the product must take much longer than its launch."""
_BUFFER_BYTES = 512 << 20
_REPEATS = 5


def device_here() -> Gpu:
    """Measure the rates of a 16-bit matrix product and of reading memory; the best of several."""
    import torch

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    size = _SIZE[device]
    matrix = torch.ones(size, size, dtype=torch.bfloat16, device=device)
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

    memory = torch.cuda.get_device_properties(0).total_memory if cuda else 0
    if not cuda:
        import psutil

        memory = psutil.virtual_memory().total
    flops = 2 * size**3 / best(lambda: matrix @ matrix)
    bandwidth = _BUFFER_BYTES / best(buffer.sum)
    # Ranks on one CPU communicate through its memory.
    return Gpu(HERE, flops, bandwidth, memory, bandwidth / 2)
