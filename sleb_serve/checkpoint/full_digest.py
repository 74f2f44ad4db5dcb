"""SHA-256 over all bytes of tensors, part by part, on several cores."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sleb_serve.errors import SlebError, first_line
from sleb_serve.utils import strict_json

Tensor = tuple[str, str, list[int], int, int, Path]
"""A tensor's name, dtype, shape, first byte, the byte after its last, and its file."""

Reading = Callable[[int, int], None]
"""Told how many bytes were read, and of how many."""

_CHUNK_BYTES = 1 << 20
_MOST_THREADS = 8


def not_told(done: int, total: int) -> None:
    """A `Reading` that nobody watches."""


def full_digests(parts: Sequence[Sequence[Tensor]], reading: Reading = not_told) -> tuple[str, ...]:
    """The digest of each part: over its tensors in order, whole, each behind what it is.

    Raises:
        SlebError: a file cannot be read, or is shorter than its header says.
    """
    sizes = [sum(end - start for _, _, _, start, end, _ in part) for part in parts]
    found: list[str] = []
    reading(0, sum(sizes))
    # Hashing lets other threads run.
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        for digest in pool.map(_digest, parts):
            found.append(digest)
            reading(sum(sizes[: len(found)]), sum(sizes))
    return tuple(found)


def _digest(part: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    for name, dtype, shape, start, end, file in part:
        # With the size, no bytes of one tensor can stand for the head of the next.
        digest.update(strict_json.canonical([name, dtype, shape, end - start]))
        try:
            _update(digest, buffer, file, start, end)
        except OSError as error:
            raise SlebError(
                f"cannot read {file}: {first_line(error)}; download the model again"
            ) from error
    return digest.hexdigest()


def _update(digest: Any, buffer: memoryview, file: Path, start: int, end: int) -> None:
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        left = end - start
        while left:
            count = stream.readinto(buffer[:left])
            if not count:
                raise SlebError(f"{file} became shorter while it was read; download it again")
            digest.update(buffer[:count])
            left -= count
