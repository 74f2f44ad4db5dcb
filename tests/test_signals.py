"""A signal at any moment leaves no file behind."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys
import tempfile
import time
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


class _Destroyed:
    """An object in whose destructor a signal arrives."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


def _in_a_destructor(number: int) -> None:
    _Destroyed(number)


def _before_a_broken_destructor(number: int) -> None:
    class HalfMade:
        def __init__(self) -> None:
            signal.raise_signal(number)
            self.position = 0

        def __del__(self) -> None:
            print(self.position)

    HalfMade()


def _in_a_callback_of_c_code(number: int) -> None:
    callback = ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal(number))
    callback()


def _in_a_library_that_catches_all(number: int) -> None:
    try:
        signal.raise_signal(number)
    except BaseException:
        return


SWALLOWED = [
    _in_a_destructor,
    _before_a_broken_destructor,
    _in_a_callback_of_c_code,
    _in_a_library_that_catches_all,
]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("swallow", SWALLOWED, ids=lambda function: function.__name__.strip("_"))
def test_a_signal_whose_exception_is_swallowed_comes_again(
    swallow: Callable[[int], None],
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    expected = KeyboardInterrupt if number == signal.SIGINT else StoppedError
    cleaned = []

    def command() -> None:
        with ended_by_signals():
            try:
                swallow(number)
                time.sleep(30)
            finally:
                # Longer than the signal takes to come again, which must not break a clean-up.
                time.sleep(0.5)
                cleaned.append(True)

    with pytest.raises(expected):
        command()
    assert cleaned
    assert capfd.readouterr().err == ""


def test_a_second_signal_ends_a_clean_up_that_hangs() -> None:
    def command() -> None:
        with ended_by_signals():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGINT)
                time.sleep(30)

    with pytest.raises(KeyboardInterrupt):
        command()
