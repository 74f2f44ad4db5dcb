"""Devices, pipes and symbolic links as outputs: written to or through, never replaced."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from commands import Capture, refused, select_arguments
from conftest import Models
from judging import SOME_TEXT
from sleb_serve.cli.main import main
from sleb_serve.errors import SlebError
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.utils.atomic_io import write_atomically


def device(path: Path, minor: int) -> Path:
    """A device like those in /dev: 3 is null, 7 is full."""
    try:
        os.mknod(path, 0o666 | 0o020000, os.makedev(1, minor))
        path.read_bytes() if minor == 3 else None
    except OSError as error:
        pytest.skip(f"no device can be made here: {error}")
    return path


def commands(model: Path, manifest: Path, output: Path) -> list[list[str]]:
    return [
        select_arguments(model, output),
        ["eval", str(model), "-m", str(manifest), "--blocks", "0,2", *SOME_TEXT, "-o", str(output)],
        ["import", str(model), "[1, 3]", "-o", str(output)],
    ]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_device_is_written_to_and_stays(
    models: Models, tmp_path: Path, capsys: Capture, number: int
) -> None:
    manifest = tmp_path / "m.json"
    assert main(select_arguments(models("llama"), manifest)) == 0
    folder = tmp_path / "dev"
    folder.mkdir()
    null, full = device(folder / "null", 3), device(folder / "full", 7)
    assert main(commands(models("llama"), manifest, null)[number]) == 0
    capsys.readouterr()
    assert "cannot write" in refused(commands(models("llama"), manifest, full)[number], capsys)
    assert sorted(folder.iterdir()) == [full, null]
    assert null.is_char_device()
    assert full.is_char_device()


def test_a_pipe_gets_the_whole_content_once(models: Models, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    assert main(["eval", str(models("llama")), *SOME_TEXT, "-o", str(pipe)]) == 0
    reader.join(10)
    report: dict[str, Any] = json.loads(got[0])
    assert report["results"][0]["perplexity"].keys() == {"python-docs"}
    assert [file.name for file in tmp_path.iterdir()] == ["pipe"]


def test_what_needs_a_file_beside_it_refuses_a_device(
    models: Models, tmp_path: Path, capsys: Capture
) -> None:
    null = device(tmp_path / "null", 3)
    for more in (["--resume"], ["--repair", "fold", "--sequences", "4"]):
        line = refused([*select_arguments(models("llama"), null), *more], capsys)
        assert "need a file: give --output" in line


def test_a_symbolic_link_is_written_through(models: Models, tmp_path: Path) -> None:
    store, link = tmp_path / "store", tmp_path / "link.json"
    store.mkdir()
    link.symlink_to(store / "m.json")
    for _ in range(2):
        assert main(select_arguments(models("llama"), link)) == 0
        assert link.is_symlink()
        assert read_manifest(store / "m.json") == read_manifest(link)
    link.unlink()
    link.symlink_to(tmp_path / "nowhere" / "m.json")
    with pytest.raises(SlebError, match="cannot write"):
        write_atomically(link, b"")
