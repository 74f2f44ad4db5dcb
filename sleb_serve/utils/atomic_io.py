"""Atomic writing of files and folders."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sleb_serve.errors import SlebError, first_line
from sleb_serve.utils.scratch import ScratchFolder
from sleb_serve.utils.signals import signals_held


def is_stream(path: Path) -> bool:
    """Return whether `path` is a device or a pipe, which is written to but never replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


def temporary_prefix(path: Path) -> str:
    """Return the name prefix of temporary files and folders for `path`."""
    return f".{target_of(path).name}.incomplete-"


def check_writable(path: Path) -> None:
    """Refuse an output path that `write_atomically` could not write.

    Raises:
        SlebError: the parent is not a writable folder, or `path` is a folder.
    """
    if path.is_dir():
        raise SlebError(f"cannot write {path}: it is a folder; give the path of a file")
    if is_stream(path):
        return
    parent = target_of(path).parent
    if not parent.is_dir():
        raise SlebError(f"cannot write {path}: there is no folder {parent}; create it first")
    try:
        with tempfile.NamedTemporaryFile(dir=parent, prefix=temporary_prefix(path)):
            pass
    except OSError as error:
        raise SlebError(
            f"cannot write {path}: {first_line(error)}; choose another output path"
        ) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` completely or not at all.

    Raises:
        SlebError: the file could not be written; whatever was at `path` before is still there.
    """
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Provide a temporary file that replaces `path` on success, with fsync and rename.

    Replaces the target of a symbolic link, not the link. For a device or a pipe, writes the whole
    content at the end.

    Raises:
        SlebError: the file could not be written; whatever was at `path` before is still there.
    """
    temporary: Path | None = None
    try:
        if is_stream(path):
            with ScratchFolder() as folder:
                yield Path(folder) / "content"
                with path.open("wb") as stream, (Path(folder) / "content").open("rb") as content:
                    shutil.copyfileobj(content, stream)
            return
        path = target_of(path)
        # mkstemp makes the file readable only by its owner, but other users of a shared model store
        # must read manifests, so set the mode that open() would have used.
        with signals_held():
            descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=temporary_prefix(path))
            os.close(descriptor)
            temporary = Path(name)
        yield temporary
        with temporary.open("rb+") as file:
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.fsync(file.fileno())
        os.replace(temporary, path)
        parent = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
    except OSError as error:
        raise SlebError(
            f"cannot write {path}: {first_line(error)}; nothing was changed there"
        ) from error
    finally:
        if temporary is not None:
            with signals_held():
                temporary.unlink(missing_ok=True)


@contextmanager
def shared_folder(folder: Path) -> Iterator[Path]:
    """Provide a temporary folder that becomes `folder` on success.

    Several processes may create the same folder; the second one drops its own.

    Raises:
        OSError: it could not be created, and no other process created it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary: Path | None = None
    try:
        with signals_held():
            temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        yield temporary
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        if temporary is not None:
            with signals_held():
                shutil.rmtree(temporary, ignore_errors=True)


def target_of(path: Path) -> Path:
    """Return the target of a symbolic link, or the path itself."""
    return path.resolve() if path.is_symlink() else path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
