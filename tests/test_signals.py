"""A signal at any moment leaves no file behind."""

from __future__ import annotations

import fcntl
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sleb_serve.cli.signals import StoppedError, ended_by_signals
from sleb_serve.convert.export import _whole_folder
from sleb_serve.utils.atomic_io import shared_folder, whole_file
from sleb_serve.utils.outputs import locked
from sleb_serve.utils.scratch import ScratchFolder

MAKERS: dict[str, Callable[[Path], Any]] = {
    "lock": lambda folder: locked(folder / ".lock", folder / "x"),
    "file": lambda folder: whole_file(folder / "x"),
    "shared folder": lambda folder: shared_folder(folder / "x"),
    "exported folder": lambda folder: _whole_folder(folder / "x"),
    "scratch": lambda _folder: ScratchFolder(),
}
MOMENTS: dict[str, tuple[Any, str]] = {
    "created": (os, "open"),
    "locked": (fcntl, "flock"),
    "file made": (tempfile, "mkstemp"),
    "folder made": (tempfile, "mkdtemp"),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("maker", MAKERS)
def test_a_signal_while_a_file_is_made_leaves_nothing(
    maker: str,
    moment: str,
    number: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, name = MOMENTS[moment]
    original = getattr(module, name)
    sent: list[int] = []

    def interrupted(*arguments: Any, **named: Any) -> Any:
        result = original(*arguments, **named)
        if not sent:
            sent.append(number)
            signal.raise_signal(number)
        return result

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    try:
        with ended_by_signals():
            monkeypatch.setattr(module, name, interrupted)
            with MAKERS[maker](tmp_path):
                pass
    except (StoppedError, KeyboardInterrupt):
        assert sent
    finally:
        monkeypatch.undo()
    if sent:
        assert list(tmp_path.iterdir()) == []
