"""Sequences of tokens from every source, and the official sampling."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import ROOT, SHARED_DATASETS, tokenizer
from sleb_serve.data.calibration import held_out_sequences, judged_sequences, make_sequences
from sleb_serve.data.tokenizer import Chats, Tokenizer, load_tokenizer
from sleb_serve.errors import SlebError
from sleb_serve.manifest.schema import Calibration


def codes(text: str) -> list[int]:
    return [ord(letter) for letter in text]


letters = Tokenizer(codes)


TEXT = "the quick brown fox jumps over the lazy dog. " * 40


def test_a_file_is_cut_into_consecutive_windows_from_its_start(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT)
    sequences = make_sequences(
        str(tmp_path / "t.txt"), letters, sequences=5, sequence_length=100, seed=3
    )
    assert [bytes(sequence).decode() for sequence in sequences.tokens] == [
        TEXT[i * 100 : (i + 1) * 100] for i in range(5)
    ]
    digest = hashlib.sha256(b"".join(struct.pack("<q", ord(c)) for c in TEXT[:500])).hexdigest()
    assert sequences.calibration == Calibration(
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
        make_sequences(
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
        return codes(text)

    sequences = make_sequences(
        str(tmp_path / "t.txt"), Tokenizer(tokenize), sequences=2, sequence_length=50
    )
    assert sum(seen) < 2000
    assert bytes(sequences.tokens[1]).decode() == TEXT[50:100]


def test_the_embedded_text_is_on_every_machine() -> None:
    sequences = make_sequences("python-docs", letters, sequences=4, sequence_length=64)
    assert len(sequences.tokens) == 4
    assert sequences.calibration.source == "python-docs"


def test_held_out_windows_do_not_overlap_the_calibration() -> None:
    used = make_sequences("python-docs", letters, sequences=4, sequence_length=64)
    held_out = held_out_sequences(letters, 4, 64, used.calibration)
    assert len(held_out) == 4
    assert not set(held_out) & set(used.tokens)
    everything = Calibration("python-docs", None, 10**6, 64, 0, "0" * 64)
    with pytest.raises(SlebError, match="overlap"):
        held_out_sequences(letters, 4, 64, everything)


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("t.txt", b"", {}, "is empty"),
        ("t.txt", b" \n\n ", {}, "is empty"),
        ("t.txt", b"short", {}, "has 5 tokens, less than one sequence of 100"),
        ("t.txt", b"x" * 250, {}, "gives 2 sequences of 100 tokens, 3 were asked for"),
        ("t.txt", b"\xff\xfe\x00", {}, "not UTF-8"),
        ("t.txt", None, {}, "cannot read"),
        ("t.csv", b"a,b", {}, "unknown text"),
        ("t.jsonl", b"{", {}, "cannot read"),
        ("t.jsonl", b'{"words": "a"}', {}, r"line 1 has none .* but \['words'\]: text, messages"),
        ("t.jsonl", b'\n{"text": "a"}\n{"text": 3}', {}, "line 3 has something else than a string"),
        ("t.jsonl", b'{"text": "a"}\n{', {}, "line 2 is not JSON"),
        ("t.jsonl", b"[" * 100_000, {}, "line 1 is not JSON"),
        ("t.jsonl", b'{"text": "\\ud800"}', {}, "line 1 has a lone surrogate"),
        ("t.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}', {}, "no chat template; "),
        ("t.jsonl", b"3", {}, "cannot read"),
        ("t.jsonl.gz", b"plain", {}, "cannot read"),
        (
            "t.jsonl.gz",
            gzip.compress(b'{"text": "a"}', mtime=0)[:-9] + b"xxxxxxxxx",
            {},
            "cannot read",
        ),
        ("t.parquet", b"plain", {}, "cannot read"),
        ("t.txt", b"x" * 999, {"sequence_length": 1}, "at least 2 tokens"),
        ("t.txt", b"x" * 999, {"sequences": 0}, "at least one sequence"),
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
        make_sequences(str(tmp_path / name), letters, **arguments)


PARTS = ["Fifty.", "\u00e9t\u00e9"]
ASKED, TOLD = "How many seats?\n\nThe team plan.", "\n".join(PARTS)
CHAT = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": TOLD}]
SAME_CHAT: dict[str, dict[str, Any]] = {
    "messages": {"messages": CHAT, "id": 7},
    "messages, parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": ASKED}], "name": None},
            {"role": "assistant", "content": [{"type": "text", "text": part} for part in PARTS]},
        ]
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": TOLD}]
    },
    "conversations": {"conversations": CHAT},
    "alpaca": {"instruction": "How many seats?", "input": "The team plan.", "output": TOLD},
    "alpaca, no input": {"instruction": ASKED, "input": "", "output": TOLD},
    "dolly": {"instruction": "How many seats?", "context": "The team plan.", "response": TOLD},
    "completion": {"prompt": ASKED, "completion": TOLD},
    "response": {"prompt": ASKED, "response": TOLD, "text": None},
    "turns": {"prompt": CHAT[:1], "completion": CHAT[1:]},
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer that begins every text with <s>, as its chat template does."""
    from tokenizers.processors import TemplateProcessing

    made = tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    made.chat_template = (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'critic' %}{{ raise_exception('no critics here') }}{% endif %}"
        "{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}{% endfor %}"
    )
    made.name_or_path = str(tmp_path_factory.mktemp("tokenizer"))
    made.save_pretrained(made.name_or_path)
    return made


def ours(theirs: Any) -> Tokenizer:
    folder: Any = SimpleNamespace(path=Path(theirs.name_or_path))
    return load_tokenizer(folder)


def served(theirs: Any, messages: list[dict[str, Any]]) -> list[int]:
    """The tokens of a chat as the model gets them from a server."""
    ids: list[int] = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    return ids


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    import pyarrow
    import pyarrow.parquet

    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        columns = {column for row in rows for column in row}
        rows = [{column: row.get(column) for column in columns} for row in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return str(path)


@pytest.mark.parametrize("kind", SAME_CHAT)
@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.parquet"])
def test_a_chat_of_every_kind_is_what_the_served_model_reads(
    tmp_path: Path, theirs: Any, name: str, kind: str
) -> None:
    other = [{"role": "system", "content": "Be brief."}, *CHAT]
    rows = [SAME_CHAT[kind], {"messages": other}]
    if name == "t.parquet" and kind == "messages, parts":
        rows = rows[:1]  # a column of a table has one type
    file = write_rows(tmp_path / name, rows)
    between = theirs("\n\n", add_special_tokens=False)["input_ids"]
    expected = served(theirs, CHAT)
    if len(rows) == 2:
        expected = [*expected, *between, *served(theirs, other)]
    (sequence,) = make_sequences(
        file, ours(theirs), sequences=1, sequence_length=len(expected)
    ).tokens
    assert list(sequence) == expected
    assert sequence[:2].count(theirs.bos_token_id) == 1
    assert judged_sequences(file, ours(theirs), len(expected)) == (sequence,)


def test_texts_and_chats_may_stand_in_one_file(tmp_path: Path, theirs: Any) -> None:
    file = write_rows(tmp_path / "t.jsonl", [{"text": "A text."}, {"messages": CHAT}])
    expected = [*theirs("A text.\n\n")["input_ids"], *served(theirs, CHAT)]
    assert expected[0] == theirs.bos_token_id
    assert judged_sequences(file, ours(theirs), len(expected)) == (tuple(expected),)


def test_a_chat_that_a_tokenizer_has_no_template_for_is_refused(
    tmp_path: Path, theirs: Any
) -> None:
    bare = tokenizer()
    bare.chat_template = None
    bare.name_or_path = str(tmp_path)
    bare.save_pretrained(tmp_path)
    file = write_rows(tmp_path / "t.jsonl", [{"text": "A text."}, SAME_CHAT["alpaca"]])
    with pytest.raises(SlebError, match=r"line 2 is a chat, .* no chat template; give rows with a"):
        make_sequences(file, ours(bare), sequences=1, sequence_length=8)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "line 2 has no list of messages in messages"),
        ({"messages": "hello"}, "line 2 has no list of messages in messages"),
        ({"messages": ["hello"]}, r"line 2 has no message in messages\[0\]"),
        ({"messages": [{"role": "user"}]}, r"string in messages\[0\].content"),
        ({"messages": [{"role": 3, "content": "a"}]}, r"string in messages\[0\].role"),
        ({"messages": [{"role": "user", "content": 3}]}, r"string in messages\[0\].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            r"a part in messages\[0\] that is not of type text; only text is read",
        ),
        ({"messages": [{"role": "critic", "content": "a"}]}, "chat template: no critics here"),
        ({"conversations": [{"from": "bot", "value": "a"}]}, r"'bot' as speaker of conv"),
        ({"conversations": [{"value": "a"}]}, r"None as speaker of conversations\[0\]"),
        ({"instruction": "a"}, r"none of the columns known here, but \['instruction'\]"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "none of the columns known here"),
        ({"output": "a"}, "none of the columns known here"),
        ({"instruction": ["a"], "output": "b"}, "something else than a string in instruction"),
        (["a"], "line 2 is not an object"),
    ],
)
def test_a_row_that_is_no_chat_is_refused_by_its_line(
    tmp_path: Path, theirs: Any, row: Any, message: str
) -> None:
    file = write_rows(tmp_path / "t.jsonl", [{"messages": CHAT}, row])
    with pytest.raises(SlebError, match=message) as caught:
        make_sequences(file, ours(theirs), sequences=1, sequence_length=200)
    assert str(caught.value).isprintable()


def test_a_table_of_an_unknown_kind_is_refused_by_its_row(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "t.parquet", [{"text": "a", "n": 1}, {"text": None, "n": 2}])
    with pytest.raises(SlebError, match=r"row 2 has none of the columns known here, but no values"):
        make_sequences(file, letters, sequences=1, sequence_length=8)
    file = write_rows(tmp_path / "t.parquet", [{"words": "a"}])
    with pytest.raises(SlebError, match=r"row 1 has none .* but \['words'\]: text, messages"):
        make_sequences(file, letters, sequences=1, sequence_length=8)


def test_only_the_needed_chats_of_a_long_file_are_rendered(tmp_path: Path) -> None:
    rendered = []

    def render(messages: list[dict[str, Any]], answer_next: bool) -> str:
        rendered.append(messages)
        return TEXT

    file = write_rows(tmp_path / "t.jsonl", [{"messages": CHAT}] * 500)
    make_sequences(file, Tokenizer(codes, Chats(render, codes)), sequences=2, sequence_length=50)
    assert len(rendered) < 5


@pytest.mark.skipif(not SHARED_DATASETS.is_dir(), reason="needs the offline data sets")
def test_wikitext2_is_sampled_as_the_official_code_does() -> None:
    """In a process of its own: `datasets` reads its cache's place when it is imported."""
    script = """
import json
from datasets import load_dataset
from sleb_serve.data.calibration import Tokenizer, make_sequences
letters = Tokenizer(lambda text: [ord(letter) for letter in text])
ours = make_sequences("wikitext2", letters, sequences=None, sequence_length=2048, seed=7)
more = make_sequences("wikitext2", letters, sequences=40, sequence_length=2048, seed=7)
data = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="train").shuffle(seed=7)
text = "\\n\\n".join(data[:128]["text"])
theirs = [letters(text)[i * 2048:(i + 1) * 2048] for i in range(len(text) // 2048)]
assert [list(sequence) for sequence in ours.tokens] == theirs
assert (ours.calibration.rows, ours.calibration.split) == (128, "train")
assert more.calibration.rows > 128 and len(more.tokens) == 40
assert list(more.tokens[:len(theirs)]) == list(ours.tokens)
"""
    environment = {**os.environ, "HF_DATASETS_CACHE": str(SHARED_DATASETS)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
