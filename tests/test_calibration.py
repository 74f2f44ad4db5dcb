"""Windows of tokens from every source, and the official sampling."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, SHARED_DATASETS
from sleb_serve.calibration import held_out_windows, make_windows
from sleb_serve.errors import SlebError
from sleb_serve.manifest import Calibration


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


TEXT = "the quick brown fox jumps over the lazy dog. " * 40


def test_a_file_is_cut_into_consecutive_windows_from_its_start(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT)
    windows = make_windows(
        str(tmp_path / "t.txt"), letters, sequences=5, sequence_length=100, seed=3
    )
    assert [bytes(window).decode() for window in windows.tokens] == [
        TEXT[i * 100 : (i + 1) * 100] for i in range(5)
    ]
    digest = hashlib.sha256(b"".join(struct.pack("<q", ord(c)) for c in TEXT[:500])).hexdigest()
    assert windows.calibration == Calibration(
        source=str(tmp_path / "t.txt"),
        split=None,
        sequences=5,
        sequence_length=100,
        seed=3,
        tokens_sha256=digest,
    )


def test_every_kind_of_file_gives_the_same_windows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [TEXT[:300], TEXT[300:700], "\u00e9t\u00e9 " * 50]
    lines = "".join(json.dumps({"text": row, "id": 1}) + "\n" for row in rows)
    (tmp_path / "t.txt").write_text("\n\n".join(rows))
    (tmp_path / "t.jsonl").write_text(lines)
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "t.parquet")
    found = {
        make_windows(
            str(tmp_path / name), letters, sequences=8, sequence_length=100
        ).calibration.tokens_sha256
        for name in ("t.txt", "t.jsonl", "t.jsonl.gz", "t.parquet")
    }
    assert len(found) == 1


def test_only_the_needed_part_of_a_long_text_is_tokenised(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT * 100)
    seen = []

    def tokenize(text: str) -> list[int]:
        seen.append(len(text))
        return letters(text)

    windows = make_windows(str(tmp_path / "t.txt"), tokenize, sequences=2, sequence_length=50)
    assert sum(seen) < 2000
    assert bytes(windows.tokens[1]).decode() == TEXT[50:100]


def test_the_embedded_text_is_on_every_machine() -> None:
    windows = make_windows("python-docs", letters, sequences=4, sequence_length=64)
    assert len(windows.tokens) == 4
    assert windows.calibration.source == "python-docs"


def test_held_out_windows_do_not_overlap_the_calibration() -> None:
    used = make_windows("python-docs", letters, sequences=4, sequence_length=64)
    held_out = held_out_windows(letters, 4, 64, used.calibration)
    assert len(held_out) == 4
    assert not set(held_out) & set(used.tokens)
    everything = Calibration("python-docs", None, 10**6, 64, 0, "0" * 64)
    with pytest.raises(SlebError, match="overlap"):
        held_out_windows(letters, 4, 64, everything)


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("t.txt", b"", {}, "is empty"),
        ("t.txt", b" \n\n ", {}, "is empty"),
        ("t.txt", b"short", {}, "has 5 tokens, less than one window of 100"),
        ("t.txt", b"x" * 250, {}, "gives 2 windows of 100 tokens, 3 were asked for"),
        ("t.txt", b"\xff\xfe\x00", {}, "not UTF-8"),
        ("t.txt", None, {}, "cannot read"),
        ("t.csv", b"a,b", {}, "unknown text"),
        ("t.jsonl", b"{", {}, "cannot read"),
        ("t.jsonl", b'{"words": "a"}', {}, "line 1 has no text"),
        ("t.jsonl", b"3", {}, "cannot read"),
        ("t.jsonl.gz", b"plain", {}, "cannot read"),
        ("t.parquet", b"plain", {}, "cannot read"),
        ("t.txt", b"x" * 999, {"sequence_length": 1}, "at least 2 tokens"),
        ("t.txt", b"x" * 999, {"sequences": 0}, "at least one window"),
        ("t.txt", b"x" * 999, {"rows": 5}, "has no rows"),
    ],
)
def test_bad_texts_are_refused(
    tmp_path: Path, name: str, content: bytes | None, options: dict[str, int], message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    arguments = {"sequences": 3, "sequence_length": 100, **options}
    with pytest.raises(SlebError, match=message):
        make_windows(str(tmp_path / name), letters, **arguments)


@pytest.mark.skipif(not SHARED_DATASETS.is_dir(), reason="needs the offline data sets")
def test_wikitext2_is_sampled_as_the_official_code_does() -> None:
    """In a process of its own: `datasets` reads its cache's place when it is imported."""
    script = """
import json
from datasets import load_dataset
from sleb_serve.calibration import make_windows
letters = lambda text: [ord(letter) for letter in text]
ours = make_windows("wikitext2", letters, sequences=None, sequence_length=2048, seed=7)
more = make_windows("wikitext2", letters, sequences=40, sequence_length=2048, seed=7)
data = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="train").shuffle(seed=7)
text = "\\n\\n".join(data[:128]["text"])
theirs = [letters(text)[i * 2048:(i + 1) * 2048] for i in range(len(text) // 2048)]
assert [list(window) for window in ours.tokens] == theirs
assert (ours.calibration.rows, ours.calibration.split) == (128, "train")
assert more.calibration.rows > 128 and len(more.tokens) == 40
assert list(more.tokens[:len(theirs)]) == list(ours.tokens)
"""
    environment = {**os.environ, "HF_DATASETS_CACHE": str(SHARED_DATASETS)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
