"""No argument of any command causes a traceback or an unprintable message."""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import answered, select_arguments
from conftest import Models
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
    assert one_line("cannot read 'http://me:hunter2@c/'") == "cannot read 'http://***@c/'"
    assert one_line("of hf://org/name@main/m.json") == "of hf://org/name@main/m.json"
    assert one_line(f"cannot read {'x' * 5000} no") == f"cannot read {'x' * 60}… no"
    long = one_line("cannot read " + "x\x1b " * 5000 + "; do that")
    assert len(long) == 1000
    assert long.startswith("cannot read x\\x1b x")
    assert long.endswith("x\\x1b ; do that")


ANY_VALUES = (
    *(*VALUES, " ", "-1", "0", "1", "3", "1.5", "-0.5", "1000000", str(1 << 31), str(1 << 63)),
    *("-" + "9" * 41, "9" * 5000, "0.0000000001", "inf", "-inf", "nan", "1e999", "1e-999", "1e3"),
    *("\x1b[31m\x07.json", "\u202e", "\U000e0001", "a\x00b", "\udfff", "-", "a,b", ",", "1,1"),
    *("[", "[1]", "{}", '{"a": 1}', "null", "[[[[" * 5000, "/dev/null", "/", ".", "..", "~"),
    *("a/b/c", "\xe9", "0x10", "\uff11", "+5", " 5 ", "5_0", "auto", "none", "python-docs"),
    *("http://localhost:1", "http://me:hunter2@c/", "q_proj", "ttft:1", "ttft:nan", "ttft:-1"),
    *("perplexity<nanx", "perplexity<999999x", "99999T", "0G", "1e9G", "5:5", "python-docs:nan"),
    *("python-docs:-1", "python-docs:0", "python-docs:inf", "python-docs:1e308,c4:1"),
)


def whole(model: Path) -> dict[str, list[str]]:
    """A command line of each command that is quick, or is refused soon, with all that it needs."""
    nobody = "http://127.0.0.1:1"
    return {
        "export": ["export", str(model), "-m", "h.json", "-o", "out"],
        "import": ["import", str(model), "[1, 2]", "-o", "out"],
        "check": ["check", str(model), "-m", "h.json"],
        "plan": ["plan", str(model)],
        "show": ["show", "h.json"],
        "architectures": ["architectures"],
        "probe": ["probe", nobody, "-m", "h.json"],
        "canary": ["canary", "--dense", nobody, "--pruned", nobody],
        "serve": ["serve", str(model), "-m", "h.json", "--dry-run"],
        "bench": ["bench", "/no/model", "-m", "h.json", "-o", "out"],
        "report": ["report", "nowhere"],
        "heal": ["heal", "/no/model", "-m", "h.json", "-o", "out"],
        "select": select_arguments(Path("/no/model"), Path("out")),
        "eval": ["eval", "/no/model", "-m", "h.json", "-o", "out"],
    }


def cases(model: Path) -> list[list[str]]:
    """Every value in place of every option's and of every positional argument."""
    found = []
    lines = whole(model)
    for command, flag in options():
        if flag != "--help" and command in lines:
            found += [[*lines[command], f"{flag}={value}"] for value in ANY_VALUES]
    for line in lines.values():
        for place in range(1, len(line)):
            if not line[place].startswith("-"):
                found += [[*line[:place], value, *line[place + 1 :]] for value in ANY_VALUES]
    return found


def try_arguments(lines: list[list[str]], model: Path, folder: Path) -> None:
    manifest = folder.parent / "h.json"
    assert main(["import", str(model), "[1, 2, 5]", "-o", str(manifest)]) == 0
    for line in lines:
        shutil.copy(manifest, folder / "h.json")
        done = answered(*line)
        assert "hunter2" not in done.error + done.out, line
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def test_a_wrong_argument_of_a_whole_command_line(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    lines = cases(models("llama"))
    try_arguments(random.sample(lines, 25), models("llama"), folder)


@pytest.mark.slow
def test_thousands_of_wrong_arguments_of_whole_command_lines(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    lines = cases(models("llama"))
    assert len(lines) > 10_000
    try_arguments(random.sample(lines, 3000), models("llama"), folder)
