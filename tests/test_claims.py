"""Claimed outputs: other files are kept, a second run is refused, a stopped one leaves nothing."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from commands import Capture, refused, run_with_one_thread, select_arguments
from conftest import Models
from forking import end_fork, start_fork
from healing import COMMAND
from judging import SOME_TEXT
from sleb_bench.files import claimed_folder
from sleb_serve.cli.main import main
from sleb_serve.convert.export import export
from sleb_serve.errors import SlebError
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.utils.outputs import claimed, locked, object_with
from sleb_serve.utils.scratch import ScratchFolder

LONG = ("--remove", "6", "--sequences", "30", "--sequence-length", "512")
"""A search of seconds."""
ANY = object_with("a thing", "thing")


@pytest.fixture
def manifest(models: Models, tmp_path: Path) -> Path:
    path = tmp_path / "removed.json"
    assert main(["import", str(models("llama")), "[1, 2, 5]", "-o", str(path)]) == 0
    return path


def writing(model: Path, manifest: Path, output: Path) -> dict[str, list[str]]:
    """Every command that writes a file, by a name, writing to `output`."""
    to = ["-o", str(output)]
    removal = [str(model), "-m", str(manifest)]
    return {
        "select": select_arguments(model, output),
        "select fold": select_arguments(model, output, "--repair", "fold", "--sequences", "4"),
        "heal": ["heal", *removal, *to, *COMMAND],
        "eval": ["eval", *removal, *SOME_TEXT, *to],
        "eval picture": ["eval", *removal, *SOME_TEXT, "--blocks", "0,2", *to],
        "import": ["import", str(model), "[1, 3]", *to],
        "mergekit": ["export", *removal, "--format", "mergekit", *to],
        "llama.cpp": ["export", *removal, "--format", "llama.cpp", *to],
    }


BESIDE = {
    "select": ("", ".search.jsonl"),
    "select fold": ("", ".search.jsonl", ".repair.safetensors"),
    "heal": ("", ".repair.safetensors", ".heal-3.state"),
    "eval": ("",),
    "eval picture": ("", ".png"),
    "import": ("",),
    "mergekit": ("",),
    "llama.cpp": ("",),
}
"""What each writes: the output's own name, and what follows it in names beside it."""


@pytest.mark.parametrize("name", BESIDE)
def test_a_file_of_another_kind_is_kept_unless_forced(
    name: str, models: Models, manifest: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    output = folder / "x"
    arguments = writing(models("llama"), manifest, output)[name]
    mine = {"notes": b"mine\n", "json": b'{"mine": 1}', "weights": weights(models("llama"))}
    capsys.readouterr()
    for end in BESIDE[name]:
        there = output.with_name(f"x{end}")
        for content in mine.values():
            there.write_bytes(content)
            line = refused(arguments, capsys)
            assert f"{there} exists and is not " in line
            assert "--force" in line
            assert there.read_bytes() == content
            assert list(folder.iterdir()) == [there]
        there.unlink()
    output.write_bytes(mine["notes"])
    assert main([*arguments, "--force"]) == 0
    assert output.read_bytes() != mine["notes"]
    # What is of the kind is replaced, and so is what is empty.
    assert main(arguments) == 0
    output.write_bytes(b"")
    assert main(arguments) == 0
    assert output.stat().st_size > 0
    assert not list(folder.glob(".*"))


def weights(model: Path) -> bytes:
    return (model / "model.safetensors").read_bytes()


def test_a_benchmark_is_not_written_among_other_files(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SlebError, match="holds other files"), claimed_folder(tmp_path, False):
        pass
    scratch = tmp_path / ".exported-abc"
    scratch.mkdir()
    with claimed_folder(tmp_path, True):
        assert not scratch.exists()
        with pytest.raises(SlebError, match="another run"), claimed_folder(tmp_path, True):
            pass
    (tmp_path / "records.jsonl").write_text('{"record": "setting"}\n')
    with claimed_folder(tmp_path, False):
        pass
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine.txt", "records.jsonl"]


@pytest.fixture
def searching(models: Models, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """A search in a process of its own that has made a step."""
    children = []

    def start(output: Path, *more: str, **environment: str) -> Any:
        arguments = select_arguments(models("llama"), output, *LONG, *more)
        child = start_fork(run_with_one_thread, tmp_path / "log", arguments, **environment)
        children.append(child)
        log = output.with_name(f"{output.name}.search.jsonl")
        while not (log.exists() and b'"removed"' in log.read_bytes()):
            assert child.is_alive(), (tmp_path / "log").read_text()
            time.sleep(0.01)
        return child

    yield start
    for child in children:
        end_fork(child)


def test_a_second_run_is_refused_and_a_killed_one_does_not_hold(
    searching: Callable[..., Any], models: Models, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "m.json"
    child = searching(output)
    link = tmp_path / "link.json"
    link.symlink_to(output)
    for path in (output, link):
        for more in ((), ("--resume",)):
            arguments = select_arguments(models("llama"), path, *LONG, *more)
            assert f"another run of sleb-serve writes {path}" in refused(arguments, capsys)
    assert main(["import", str(models("llama")), "[1]", "-o", str(output)]) == 2
    log = output.with_name("m.json.search.jsonl").read_bytes()
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    left = tmp_path / ".m.json.incomplete-abcd_123"
    left.write_text("half")
    (tmp_path / ".m.json.search.jsonl.incomplete-abcd_123").write_text("half")
    other = tmp_path / ".m.json.bak.incomplete-abcd_123"
    other.write_text("another's")
    arguments = select_arguments(models("llama"), output, *LONG, "--resume")
    assert main(arguments) == 0
    assert output.with_name("m.json.search.jsonl").read_bytes().startswith(log[:100])
    assert len(read_manifest(output).removed) == 6
    hidden = [file for file in tmp_path.iterdir() if file.name.startswith(".")]
    assert hidden == [other]


def test_a_second_export_into_a_folder_is_refused_while_the_first_writes(
    models: Models, manifest: Path, tmp_path: Path, capsys: Capture
) -> None:
    model, folder = str(models("llama")), tmp_path / "out"
    command = ["export", model, "-m", str(manifest), "-o", str(folder)]
    lines = []

    def again(_number: int, _count: int) -> None:
        capsys.readouterr()
        lines.append(refused(command, capsys))

    export(model, read_manifest(manifest), folder, on_shard=again)
    assert lines
    assert all(f"another run of sleb-serve writes {folder}" in line for line in lines)
    assert (folder / "config.json").exists()
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]
    assert "already exists" in refused(command, capsys)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_search_in_one_line_and_leaves_its_log(
    searching: Callable[..., Any], tmp_path: Path, number: signal.Signals
) -> None:
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    output = tmp_path / "m.json"
    child = searching(output, TMPDIR=str(scratch))
    os.kill(child.pid, number)
    child.join(30)
    assert child.exitcode == 128 + number
    lines = (tmp_path / "log").read_text().replace("\r", "\n").splitlines()
    said = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
    assert f"sleb-serve: {said}; re-run with --resume to continue" in lines
    assert not [line for line in lines if "Traceback" in line or "Error" in line]
    assert not list(scratch.iterdir())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log", "m.json.search.jsonl", "tmp"]


@pytest.mark.parametrize("name", ["heal", "eval", "transformers"])
def test_a_signal_ends_other_commands_in_one_line_and_leaves_nothing_half_written(
    name: str, models: Models, manifest: Path, tmp_path: Path
) -> None:
    scratch, folder = tmp_path / "tmp", tmp_path / "out"
    scratch.mkdir()
    folder.mkdir()
    removal = [str(models("llama")), "-m", str(manifest), "-o", str(folder / "x")]
    arguments = {
        "heal": ["heal", *removal, *COMMAND, "--tokens", "10M"],
        "eval": ["eval", *removal, "--perplexity", "python-docs", "--sequence-length", "128"],
        "transformers": ["export", *removal],
    }[name]
    child = start_fork(run_with_one_thread, tmp_path / "log", arguments, TMPDIR=str(scratch))
    try:
        assert child.pid is not None
        while not (folder / ".x.lock").exists():
            assert child.is_alive() or name == "transformers", (tmp_path / "log").read_text()
            if child.exitcode is not None:
                pytest.skip("an export of a tiny model was quicker")
            time.sleep(0.001)
        time.sleep(0 if name == "transformers" else 1)
        os.kill(child.pid, signal.SIGTERM)
        child.join(30)
    finally:
        end_fork(child)
    log = (tmp_path / "log").read_text()
    assert child.exitcode == 128 + signal.SIGTERM, log
    assert "Traceback" not in log
    assert "sleb-serve: stopped by SIGTERM" in log
    assert not list(scratch.iterdir())
    assert {file.name for file in folder.iterdir()} <= {"x.heal-3.state"}


def test_a_lock_is_held_by_one_and_leaves_nothing(tmp_path: Path) -> None:
    lock, what = tmp_path / ".lock", tmp_path / "what"
    for _ in range(2):
        with (
            locked(lock, what),
            pytest.raises(SlebError, match="another run"),
            locked(lock, what),
        ):
            pass
        assert not lock.exists()
    lock.write_text("of a process that was killed")
    with locked(lock, what):
        pass
    lock.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SlebError, match="cannot write"), locked(lock, what):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_files_of_other_outputs_are_left(tmp_path: Path) -> None:
    kept = [tmp_path / name for name in (".b.incomplete-abcdefgh", ".a.incomplete-x", ".a.old")]
    for path in kept:
        path.write_text("")
    gone = tmp_path / ".a.incomplete-abcdefgh"
    (gone / "inside").mkdir(parents=True)
    with claimed([(tmp_path / "a", ANY)]):
        assert not gone.exists()
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_scratch_folders_of_killed_runs_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left, young, used = tmp_path / "sleb-serve-left", tmp_path / "sleb-serve-young", ScratchFolder()
    for folder in (left, young):
        folder.mkdir()
    for folder in (left, Path(used.name)):
        os.utime(folder, (0, 0))
    with ScratchFolder() as mine:
        assert {path.name for path in tmp_path.iterdir()} == {
            *(young.name, Path(used.name).name, Path(mine).name)
        }
    used.cleanup()
    assert list(tmp_path.iterdir()) == [young]
