"""No argument of any command ends in a traceback, or in a message that a terminal cannot show."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest

from sleb_serve.cli.main import main, parsers
from sleb_serve.utils.terminal import one_line

VALUES = ("--", "\ud800", "9" * 41, "x" * 5000, "\x1b[31m", "\x00", "")


def options() -> Iterator[tuple[str, str]]:
    parser, _ = parsers()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        for action in command._actions:
            yield from ((name, flag) for flag in action.option_strings if flag.startswith("--"))


@pytest.mark.parametrize("value", VALUES, ids=lambda value: ascii(value)[:12])
def test_a_wrong_value_of_any_option_is_one_line(
    value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command, flag in options():
        if flag == "--help":
            continue
        arguments = [command, "/no/model"] if command == "serve" else [command]
        assert main([*arguments, f"{flag}={value}"]) == 2, (command, flag)
        error = capsys.readouterr().err
        assert error.count("\n") == 1, (command, flag, error)
        assert error.startswith("sleb-serve: error: ")
        assert error.rstrip("\n").isprintable(), (command, flag)
        assert len(error) < 800, (command, flag)
    assert list(tmp_path.iterdir()) == []


def test_messages_are_shortened_and_escaped() -> None:
    assert one_line("a\nb\tc") == "a b c"
    assert one_line("\x1b[31m \ud800 é") == r"\x1b[31m \ud800 é"
    assert one_line(f"cannot read {'x' * 5000} no") == f"cannot read {'x' * 60}… no"
    long = one_line("cannot read " + "x\x1b " * 5000 + "; do that")
    assert len(long) == 1000
    assert long.startswith("cannot read x\\x1b x")
    assert long.endswith("x\\x1b ; do that")
