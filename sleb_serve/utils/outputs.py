"""Outputs: never replace a file of another kind, and allow one run at a time.

A run claims its outputs before it begins. Existing files must be empty or of the kind to be
written; a lock file refuses a second run; and temporary files of killed runs are removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sleb_serve.errors import SlebError, first_line
from sleb_serve.utils.atomic_io import check_writable, is_stream, target_of, temporary_prefix
from sleb_serve.utils.distributed import is_first
from sleb_serve.utils.limited import read_limited
from sleb_serve.utils.signals import signals_held

_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Kind:
    """A kind of output file.

    Attributes:
        name: its name with an article.
        is_one: whether a file is of this kind; an `OSError` or `ValueError` means no.
    """

    name: str
    is_one: Callable[[Path], bool]


def object_with(name: str, *keys: str) -> Kind:
    """Return the kind of JSON files with an object that has these keys."""

    def is_one(path: Path) -> bool:
        value = json.loads(read_limited(path, _MAX_BYTES))
        return isinstance(value, dict) and value.keys() >= set(keys)

    return Kind(name, is_one)


def beginning_with(name: str, pattern: bytes) -> Kind:
    """Return the kind of files with first bytes that match a pattern."""

    def is_one(path: Path) -> bool:
        with path.open("rb") as file:
            return re.match(pattern, file.read(1 << 16)) is not None

    return Kind(name, is_one)


Output = tuple[Path, Kind]


@contextmanager
def claimed(outputs: Sequence[Output], *, force: bool = False) -> Iterator[None]:
    """Claim these files for this run; the first is the requested one.

    Args:
        outputs: paths with the kinds to be written.
        force: replace files of other kinds.

    Raises:
        SlebError: a file cannot be written or is of another kind, or another run writes it.
    """
    if not is_first():
        # The first process writes, and may already have begun.
        yield
        return
    for path, kind in outputs:
        check_writable(path)
        if not force and not _is_free(path, kind):
            raise SlebError(
                f"{path} exists and is not {kind.name}, so it is kept; give another output, or "
                f"`force` to replace it"
            )
    if not outputs or is_stream(outputs[0][0]):
        yield
        return
    first = target_of(outputs[0][0])
    with locked(first.with_name(f".{first.name}.lock"), outputs[0][0]):
        for path, _ in outputs:
            remove_leftovers(target_of(path))
        yield


def _is_free(path: Path, kind: Kind) -> bool:
    """Return whether writing there replaces nothing but a file of this kind."""
    if not path.exists() or is_stream(path) or path.stat().st_size == 0:
        return True
    try:
        return kind.is_one(path)
    except (OSError, ValueError, RecursionError):
        return False


@contextmanager
def locked(lock: Path, what: Path) -> Iterator[None]:
    """Hold a lock, which the system releases if the process is killed.

    Args:
        lock: a file that exists while the lock is held.
        what: description of the protected output, for the message.

    Raises:
        SlebError: another process holds it, or the file cannot be created.
    """
    descriptor: int | None = None
    try:
        with signals_held():
            descriptor = _lock(lock, what)
        yield
    finally:
        if descriptor is not None:
            with signals_held():
                # Remove before releasing, so that a process that has opened the file finds it gone.
                with contextlib.suppress(OSError):
                    lock.unlink()
                os.close(descriptor)


def _lock(lock: Path, what: Path) -> int:
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise SlebError(
                f"cannot write {what}: {first_line(error)}; choose another output path"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise SlebError(
                f"another run of sleb-serve writes {what}; wait until it ends, or give another "
                f"output"
            ) from None
        except OSError:
            return descriptor  # a file system without locks
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), lock.lstat()):
                return descriptor
        os.close(descriptor)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files and folders of killed runs; the lock must be held."""
    pattern = re.compile(re.escape(temporary_prefix(path)) + r"[a-z0-9_]{8}")
    with contextlib.suppress(OSError):
        for entry in path.parent.iterdir():
            if pattern.fullmatch(entry.name):
                _remove(entry)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
