"""Reading of user files up to a size limit, because a wrong path may lead to anything."""

from __future__ import annotations

from pathlib import Path


def read_limited(path: Path, most: int) -> bytes:
    """Read a file.

    Raises:
        OSError: it cannot be read, or is larger than `most` bytes.
    """
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(f"larger than {most >> 20 or 1} MiB")
    return data
