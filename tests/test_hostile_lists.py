"""Untrusted lists of blocks: read or refused in one line, quickly and with little memory."""

from __future__ import annotations

import contextlib
import random
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import answered
from conftest import Models
from sleb_serve.convert.lists import read_blocks
from sleb_serve.errors import SlebError

UNITS = (
    *(" ", "\n", "\t", "\r", "\x85", "\ufeff", "9", "0", "1:", "1_", "1.", "1,", "1 ", "+1 ", "-"),
    *(
        "- ",
        "? ",
        "[",
        "[,",
        "{a: ",
        "a: ",
        "a:\n",
        "- a\n",
        "a\n",
        "a b ",
        ": ",
        ",",
        "&a ",
        "*a ",
    ),
    *("!a ", "!!binary ", "#", "|\n", "%a\n", "---\n", "--- a\n", "--- ", "<<: a\n", '{"a":'),
    *(
        "2001-01-01 ",
        "np.int64(",
        "np.int64(1",
        "np.",
        "\\x41",
        " \n",
        "\x00",
        "\x1b[2J",
        "\U000e0001",
    ),
    *("current skip list: ", "current skip list: [1]\n", "Removal Order:", "# Total Blocks: 3\n"),
)
AROUND = (
    *(("", ""), ("'", ""), ('"', ""), ("[", "]"), ("x: ", ""), ("x: 0x", ""), ("a: |\n  x\n", "")),
    *(("a: >\n  x\n", ""), ("current skip list:", ""), ("# Total Blocks: ", ""), ("a", " b")),
    *(
        ("removed_layers: ", ""),
        ("slices: [", "]"),
        ("{", "}"),
        ("[1e", "]"),
        ("Removal Order: [", ""),
    ),
)
SIZES = (100, 15_000, 1_000_000)
NESTED = (
    "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{after}: &{after} [{', '.join(9 * [f'*{before}'])}]\n"
        for before, after in zip("abcdefghijk", "bcdefghijkl", strict=True)
    ),
    "&a [*a]",
    "&a {removed_layers: *a}",
    "removed_layers: &a [*a, 1]",
    "? [a, b]\n: c",
    "? {a: b}\n: c",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!python/object/apply:os.system [x]",
    "removed_layers: [.nan, .inf, 2001-01-01]",
    "removed_layers: !!binary aaaa",
    "".join(" " * depth + "a:\n" for depth in range(300)),
)


def long_texts() -> list[str]:
    """Every unit again and again, in every surrounding, at every size."""
    return [
        start + (unit * (size // len(unit))) + end
        for unit in UNITS
        for start, end in AROUND
        for size in SIZES
    ]


def refuse(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8", newline="")
    started = time.process_time()
    with contextlib.suppress(SlebError):
        read_blocks(str(path), 8)
    assert time.process_time() - started < 10, text[:50]


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    yield
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 200 << 20


@pytest.mark.parametrize("text", NESTED, ids=range(len(NESTED)))
def test_what_holds_itself_or_an_object_is_refused(
    text: str, models: Models, tmp_path: Path
) -> None:
    path = tmp_path / "list.yaml"
    path.write_text(text)
    done = answered("import", models("llama"), path, "-o", tmp_path / "m.json")
    assert done.code == 2
    assert done.error.startswith("sleb-serve: error: ")
    assert not (tmp_path / "m.json").exists()


def test_long_texts_are_read_or_refused_soon(tmp_path: Path) -> None:
    for text in random.sample(long_texts(), 10):
        with little_memory():
            refuse(text, tmp_path / "list.txt")


@pytest.mark.slow
def test_most_long_texts_are_read_or_refused_soon(tmp_path: Path) -> None:
    """Half of them, and of the longest, which take most of the time, some. Tracing takes long."""
    texts = long_texts()
    longest = [text for text in texts if len(text) > SIZES[1] + 100]
    shorter = [text for text in texts if len(text) <= SIZES[1] + 100]
    for text in random.sample(shorter, len(shorter) // 2) + random.sample(longest, 40):
        refuse(text, tmp_path / "list.txt")
    for text in random.sample(texts, 8):
        with little_memory():
            refuse(text, tmp_path / "list.txt")


@pytest.mark.parametrize("start", ["x: ", "{", "removed_layers: ", "a:\n- "])
def test_lists_in_lists_are_refused_soon(start: str, tmp_path: Path) -> None:
    refuse(start + "[" * 60_000, tmp_path / "list.txt")
