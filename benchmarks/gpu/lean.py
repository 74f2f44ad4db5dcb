"""Remove unneeded machine code from a CUDA library, so that it compresses well.

Usage: lean.py SOURCE TARGET. Every fat binary keeps its place but only its entries for compute
capability 9.0. FlashAttention 3 keeps only kernels for `HEADS` and `TYPES`; an unused small kernel
replaces empty binaries. Zeros fill the rest, which xz compresses well. Needs readelf and c++filt
(binutils).
"""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURE = 90
HEADS = frozenset({"64", "128"})
TYPES = frozenset({"bfloat16_t", "half_t"})
_MAGIC, _MACHINE_CODE = 0xBA55ED50, 2
_MAIN_LOOP = re.compile(
    r"CollectiveMainloopFwdSm90<\d+, .*?, cute::tuple<cute::C<\d+>, cute::C<\d+>, "
    r"cute::C<(?P<head>\d+)> ?>, (?P<value>\d+), cutlass::(?P<type>\w+), float, "
    r"cutlass::arch::Sm90, (?P<flags>.*?)>"
)
_SOFT_CAP = 2
"""Index of the flag for capped scores."""


@dataclass(frozen=True)
class FatBinary:
    """Machine code for several architectures.

    Attributes:
        start: its start in the file.
        body: start of its entries.
        end: its end.
        wanted: its entries for `ARCHITECTURE`, as bytes.
    """

    start: int
    body: int
    end: int
    wanted: tuple[bytes, ...]


def main(source: str, target: str) -> None:
    """Write a reduced `source` to `target`."""
    data = bytearray(Path(source).read_bytes())
    found = list(fat_binaries(data, *section(source)))
    small = min((entry for binary in found for entry in binary.wanted), key=len)
    kept = 0
    for binary in found:
        entries = binary.wanted
        if "_fa3_" in source:
            entries = tuple(entry for entry in entries if is_wanted(entry))
        if not entries and len(small) <= binary.end - binary.body:
            entries = (small,)
        body = b"".join(entries)
        struct.pack_into("<Q", data, binary.start + 8, len(body))
        data[binary.body : binary.end] = body.ljust(binary.end - binary.body, b"\0")
        kept += len(body)
    Path(target).write_bytes(data)
    print(f"{Path(source).name}: {len(found)} fat binaries, {kept >> 20} MiB of machine code kept")


def section(path: str) -> tuple[int, int]:
    """Return the start and length of the section of fat binaries."""
    command = ["readelf", "--sections", "--wide", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"\.nv_fatbin\s+\S+\s+[0-9a-f]+\s+([0-9a-f]+)\s+([0-9a-f]+)", text)
    if match is None:
        raise SystemExit(f"{path} holds no GPU code")
    return int(match[1], 16), int(match[2], 16)


def fat_binaries(data: bytearray, offset: int, size: int) -> Iterator[FatBinary]:
    """Yield the fat binaries of a section."""
    at, end = offset, offset + size
    while at + 16 <= end:
        magic, _, header, length = struct.unpack_from("<IHHQ", data, at)
        if magic != _MAGIC:
            at += 8  # alignment of the next
            continue
        body, stop = at + header, at + header + length
        yield FatBinary(at, body, stop, tuple(_wanted(data, body, stop)))
        at = stop


def _wanted(data: bytearray, at: int, stop: int) -> Iterator[bytes]:
    while at < stop:
        kind, _, header, payload = struct.unpack_from("<HHIQ", data, at)
        (architecture,) = struct.unpack_from("<I", data, at + 28)
        if (kind, architecture) == (_MACHINE_CODE, ARCHITECTURE):
            yield bytes(data[at : at + header + payload])
        at += header + payload


def is_wanted(code: bytes) -> bool:
    """Return whether FlashAttention 3 code has a kernel for `HEADS` and `TYPES`, or for all."""
    names = b"\n".join(sorted(set(re.findall(rb"\.text\.([A-Za-z0-9_]+)", code))))
    plain = subprocess.run(["c++filt"], input=names, capture_output=True, check=True).stdout
    loops = list(_MAIN_LOOP.finditer(plain.decode()))
    return not loops or any(_is_wanted(loop) for loop in loops)


def _is_wanted(loop: re.Match[str]) -> bool:
    capped = loop["flags"].split(",")[_SOFT_CAP].strip() == "true"
    return {loop["head"], loop["value"]} <= HEADS and loop["type"] in TYPES and not capped


if __name__ == "__main__":
    main(*sys.argv[1:3])
