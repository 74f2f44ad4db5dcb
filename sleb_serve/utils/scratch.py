"""Temporary folders; the next run removes those of killed runs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
import weakref
from pathlib import Path

from sleb_serve.utils.signals import signals_held

_PREFIX = "sleb-serve-"
_SETTLED = 60.0
"""Seconds after which a folder without a lock belongs to a dead run."""


class ScratchFolder(tempfile.TemporaryDirectory[str]):
    """Provide a locked temporary folder, and remove those of killed runs."""

    def __init__(self) -> None:
        _remove_abandoned()
        with signals_held():
            super().__init__(prefix=_PREFIX)
            descriptor = os.open(self.name, os.O_RDONLY)
            weakref.finalize(self, os.close, descriptor)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_abandoned() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            found = folder.lstat()
            mine = found.st_uid == os.getuid() and folder.is_dir() and not folder.is_symlink()
            if not mine or time.time() - found.st_mtime < _SETTLED:
                continue
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)
