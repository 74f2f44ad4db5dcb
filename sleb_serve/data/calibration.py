"""Calibration text: a source, tokenised as one text, cut into consecutive windows of token ids."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleb_serve.errors import SlebError, first_line
from sleb_serve.manifest.manifest import Calibration
from sleb_serve.utils import strict_json

Tokenize = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Chats:
    """How a model reads chats.

    Attributes:
        render: a chat's messages as one text, as the model's chat template writes it.
        encode: such a text to token ids, with no special tokens but those that it spells out.
    """

    render: Callable[[list[dict[str, Any]]], str]
    encode: Tokenize


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer.

    Attributes:
        encode: text to token ids, with the special tokens that the tokenizer adds.
        chats: for chats; None where the tokenizer has no chat template.
    """

    encode: Tokenize
    chats: Chats | None = None

    def __call__(self, text: str) -> Sequence[int]:
        """Text to token ids, with the special tokens that the tokenizer adds."""
        return self.encode(text)


DEFAULT_ROWS = 128
"""Rows that the official code takes of wikitext2 and C4 (``nsamples``)."""


@dataclass(frozen=True)
class HubText:
    """A data set on the hub: where its text is, and what the official code puts between rows.

    https://github.com/jiwonsong-dev/SLEB, utils/data_utils.py
    """

    arguments: tuple[tuple[str, Any], ...]
    split: str
    separator: str
    rows: int | None = None


HUB_TEXTS = {
    "wikitext2": HubText(
        (("path", "Salesforce/wikitext"), ("name", "wikitext-2-raw-v1")), "train", "\n\n"
    ),
    "c4": HubText(
        (
            ("path", "allenai/c4"),
            ("data_files", {"train": "en/c4-train.00000-of-01024.json.gz"}),
        ),
        "train",
        " ",
    ),
}
JUDGED_TEXTS = {
    "wikitext2": HubText(
        (("path", "Salesforce/wikitext"), ("name", "wikitext-2-raw-v1")), "test", "\n\n"
    ),
    "c4": HubText(
        (
            ("path", "allenai/c4"),
            ("data_files", {"validation": "en/c4-validation.00000-of-00008.json.gz"}),
        ),
        "validation",
        " ",
        rows=1100,
    ),
}
"""What the official code takes perplexities on."""
_JUDGED_C4_WINDOWS = 256
EMBEDDED = "python-docs"
"""Python's own help topics: 0.7 MB of English that comes with every Python."""

_BETWEEN_ROWS = "\n\n"
_CHAT_COLUMNS = ("messages", "conversations")
_INPUT_COLUMNS = ("input", "context")
_ANSWER_COLUMNS = ("output", "completion", "response")
_COLUMNS = (
    *("text", *_CHAT_COLUMNS),
    *("instruction", *_INPUT_COLUMNS, "prompt", *_ANSWER_COLUMNS),
)
_KNOWN_ROWS = (
    "text, messages, conversations, instruction (and input) with output, or prompt with completion "
    "or response"
)
_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class _BadRowError(Exception):
    """A row that cannot be read: what is wrong and what to do, to be read after its number."""


@dataclass(frozen=True)
class _Row:
    """One row of a file as text, and whether a chat template wrote it."""

    text: str
    is_chat: bool = False


@dataclass(frozen=True)
class Windows:
    """Token windows, all of the same length, and where they came from."""

    tokens: tuple[tuple[int, ...], ...]
    calibration: Calibration


def make_windows(
    source: str,
    tokenizer: Tokenizer,
    *,
    sequences: int | None,
    sequence_length: int,
    seed: int = 0,
    rows: int | None = None,
    sample: int = 0,
) -> Windows:
    """Cut `source` into consecutive windows of token ids.

    Args:
        source: ``wikitext2`` or ``c4`` (rows shuffled by `seed`, the first `rows` joined, as the
            official code does), ``python-docs`` (embedded), or a .txt, .jsonl, .jsonl.gz or
            .parquet file (its rows of text or chats from the start).
        tokenizer: the model's. A text that begins with a chat gets no special tokens but those of
            the chat template, as the model gets chats when it is served.
        sequences: how many windows at most; None for all that the rows give (8 for other sources).
        sequence_length: tokens per window, at least 2.
        seed: shuffles the rows of ``wikitext2`` and ``c4``.
        rows: how many rows of ``wikitext2`` and ``c4``; None for 128, and as many more as it
            takes to fill `sequences` windows.
        sample: which sample of the source, each as large: other rows by the seeds after `seed`,
            or of other sources, the windows that follow.

    Raises:
        SlebError: the source is unknown, unreadable, empty, or shorter than was asked for.
    """
    if sequence_length < 2:
        raise SlebError(
            f"--sequence-length {sequence_length}: a window needs at least 2 tokens, one to read "
            f"and one to predict"
        )
    if sequences is not None and sequences < 1:
        raise SlebError(f"--sequences {sequences}: at least one window is needed")
    split: str | None = None
    first = 0
    if source in HUB_TEXTS:
        seed += sample
        split = HUB_TEXTS[source].split
        ids, rows = _hub_tokens(source, tokenizer, sequences, sequence_length, seed, rows)
    else:
        if rows is not None:
            raise SlebError(f"--rows is for {' and '.join(HUB_TEXTS)}; {source} has no rows")
        sequences = sequences or 8
        first = sample * sequences
        ids = _tokens(tokenizer, source, (first + sequences) * sequence_length)
    available = len(ids) // sequence_length
    if available == 0:
        raise SlebError(
            f"text {source} has {len(ids)} tokens, less than one window of "
            f"{sequence_length}; give more text or a smaller --sequence-length"
        )
    if sequences is not None and available < first + sequences:
        raise SlebError(
            f"text {source} gives {available} windows of {sequence_length} tokens, "
            f"{first + sequences} were asked for; give more text or smaller --sequences"
        )
    count = sequences or available
    tokens = tuple(
        tuple(ids[i * sequence_length : (i + 1) * sequence_length])
        for i in range(first, first + count)
    )
    return Windows(
        tokens,
        Calibration(
            source=source,
            split=split,
            sequences=count,
            sequence_length=sequence_length,
            seed=seed,
            tokens_sha256=_digest(tokens),
            rows=rows,
        ),
    )


def judged_windows(
    source: str, tokenizer: Tokenizer, length: int, count: int | None = None
) -> tuple[tuple[int, ...], ...]:
    """Consecutive windows of a text that models are judged on, as the official code cuts them.

    Args:
        source: ``wikitext2`` (its test split), ``c4`` (256 windows of the first 1,100 rows of its
            validation split), ``python-docs`` or a file.
        tokenizer: the model's; see `make_windows`.
        length: tokens a window.
        count: how many windows at most; None for all.

    Raises:
        SlebError: the text is not there, or shorter than one window.
    """
    if source in JUDGED_TEXTS:
        hub = JUDGED_TEXTS[source]
        data = _load(source, hub, "give another --perplexity text")
        ids = tokenizer(hub.separator.join(data[: hub.rows]["text"]))
        if source == "c4":
            ids = ids[: _JUDGED_C4_WINDOWS * length]
    else:
        ids = _tokens(tokenizer, source, None if count is None else count * length)
    available = len(ids) // length
    if available == 0:
        raise SlebError(
            f"text {source} has {len(ids)} tokens, less than one window of {length}; give more "
            f"text or a smaller --sequence-length"
        )
    if count is not None:
        available = min(count, available)
    return tuple(tuple(ids[i * length : (i + 1) * length]) for i in range(available))


def held_out_windows(
    tokenize: Tokenize, count: int, length: int, calibration: Calibration | None
) -> tuple[tuple[int, ...], ...]:
    """The last `count` windows of `length` tokens of the embedded text.

    Raises:
        SlebError: they would overlap what `calibration` took from its start.
    """
    if count < 1:
        return ()
    ids = tokenize(embedded_text())
    start = len(ids) - count * length
    used = 0
    if calibration is not None and calibration.source == EMBEDDED:
        used = calibration.sequences * calibration.sequence_length
    if start < used:
        raise SlebError(
            f"{count} windows of {length} tokens of {EMBEDDED} would overlap the calibration's; "
            f"ask for fewer --perplexity-windows"
        )
    return tuple(tuple(ids[start + i * length : start + (i + 1) * length]) for i in range(count))


def _digest(windows: Sequence[Sequence[int]]) -> str:
    digest = hashlib.sha256()
    for window in windows:
        digest.update(b"".join(token.to_bytes(8, "little", signed=True) for token in window))
    return digest.hexdigest()


def _tokens(tokenizer: Tokenizer, source: str, wanted: int | None) -> Sequence[int]:
    """At least `wanted` tokens from the start of a text, if it has them; None for all.

    Reading and tokenising a file of gigabytes to use its first page would be waste. A prefix of the
    text is enough: its last few tokens may differ from the whole text's, so a margin is cut off.
    """
    rows = _rows(source, tokenizer.chats)
    texts: list[str] = []
    read = 0
    encode = tokenizer.encode
    margin = 64
    length = math.inf if wanted is None else 8 * (wanted + margin)
    while True:
        for row in rows:
            if not texts and row.is_chat and tokenizer.chats is not None:
                encode = tokenizer.chats.encode
            texts.append(row.text)
            read += len(row.text)
            if read > length:
                break
        text = _BETWEEN_ROWS.join(texts)
        if wanted is None or len(text) <= length:
            break
        ids = encode(text[: int(length)])
        if len(ids) >= wanted + margin:
            return ids[:wanted]
        length *= 2
    if not text.strip():
        raise SlebError(f"text {source} is empty; give a file with text in it")
    return encode(text)


def _hub_tokens(
    source: str,
    tokenize: Tokenize,
    sequences: int | None,
    sequence_length: int,
    seed: int,
    rows: int | None,
) -> tuple[Sequence[int], int]:
    if rows is not None and rows < 1:
        raise SlebError(f"--rows {rows}: at least one row is needed")
    hub = HUB_TEXTS[source]
    data = _load(source, hub, f"use --calibration {EMBEDDED}").shuffle(seed=seed)
    count = min(rows or DEFAULT_ROWS, len(data))
    while True:
        text = hub.separator.join(data[:count]["text"])
        ids = tokenize(text) if text.strip() else []
        enough = sequences is None or len(ids) >= sequences * sequence_length
        if enough or rows is not None or count == len(data):
            return ids, count
        count = min(2 * count, len(data))


def _load(source: str, hub: HubText, instead: str) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(**dict(hub.arguments), split=hub.split)
    except Exception as error:
        raise SlebError(
            f"cannot load the data set of {source}: {first_line(error)}; connect to the hub "
            f"once, set HF_DATASETS_CACHE, or {instead}"
        ) from error


def embedded_text() -> str:
    """Python's help topics, 0.7 MB of English that every machine with Python has."""
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def _rows(source: str, chats: Chats | None) -> Iterator[_Row]:
    """The rows of a text that is not a data set of the hub, one after the other."""
    if source == EMBEDDED:
        yield _Row(embedded_text())
        return
    path = Path(source)
    readers: dict[str, Callable[[Path], Iterator[tuple[str, object]]]] = {
        ".txt": lambda file: iter([("it", {"text": file.read_text(encoding="utf-8")})]),
        ".jsonl": _jsonl_rows,
        ".jsonl.gz": _jsonl_rows,
        ".parquet": _parquet_rows,
    }
    reader = next((read for end, read in readers.items() if path.name.endswith(end)), None)
    if reader is None:
        known = ", ".join((*HUB_TEXTS, EMBEDDED))
        raise SlebError(
            f"unknown text {source}; give {known}, or a file whose name ends in "
            f"{', '.join(readers)}"
        )
    try:
        for place, entry in reader(path):
            try:
                row = _row(entry, chats)
            except _BadRowError as error:
                raise SlebError(f"cannot read text {source}: {place} {error}") from error
            yield row
    except UnicodeDecodeError as error:
        raise SlebError(
            f"text {source} is not UTF-8 (byte {error.start}); convert it first"
        ) from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise SlebError(
            f"cannot read text {source}: {first_line(error)}; rows need one of the columns "
            f"{_KNOWN_ROWS}"
        ) from error


def _jsonl_rows(path: Path) -> Iterator[tuple[str, object]]:
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig") as file:
        for number, row in enumerate(file, 1):
            if row.strip():
                try:
                    entry = json.loads(row)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"line {number} is not JSON: {first_line(error)}") from error
                yield f"line {number}", entry


def _parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [name for name in names if name in _COLUMNS] or names
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for entry in batch.to_pylist():
                    number += 1
                    yield f"row {number}", entry
    except pyarrow.ArrowException as error:
        raise ValueError(first_line(error)) from error


def _row(entry: object, chats: Chats | None) -> _Row:
    """A row as text.

    Raises:
        _BadRowError: it is of no known kind, or broken.
    """
    if not isinstance(entry, dict):
        raise _BadRowError(f"is not an object; rows need {_KNOWN_ROWS}")
    # A parquet file has every column in every row.
    entry = {key: value for key, value in entry.items() if value is not None}
    if "text" in entry:
        row = _Row(_string(entry["text"], "text"))
    else:
        messages = _messages(entry)
        if messages is None:
            columns = strict_json.short(list(entry)) if entry else "no values"
            raise _BadRowError(f"has none of the columns known here, but {columns}: {_KNOWN_ROWS}")
        if chats is None:
            raise _BadRowError(
                "is a chat, and the tokenizer has no chat template; give rows with a column named "
                "text, or put chat_template.jinja beside the tokenizer"
            )
        try:
            row = _Row(chats.render(messages), is_chat=True)
        except Exception as error:
            raise _BadRowError(
                f"is refused by the chat template: {first_line(error)}; change or remove the row"
            ) from error
    try:
        row.text.encode()
    except UnicodeEncodeError as error:
        raise _BadRowError("has a lone surrogate, which is no text; remove the row") from error
    return row


def _messages(entry: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The chat in a row, as a chat template takes it; None if it holds none of a known kind."""
    for column in _CHAT_COLUMNS:
        if column in entry:
            return _turns(entry[column], column)
    answer = next((column for column in _ANSWER_COLUMNS if column in entry), None)
    if answer is None:
        return None
    if "instruction" in entry:
        asked = [_string(entry["instruction"], "instruction")]
        asked += [_string(entry[column], column) for column in _INPUT_COLUMNS if column in entry]
        question = [{"role": "user", "content": "\n\n".join(filter(None, asked))}]
    elif "prompt" in entry:
        question = _said(entry["prompt"], "prompt", "user")
    else:
        return None
    return [*question, *_said(entry[answer], answer, "assistant")]


def _said(value: object, column: str, role: str) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return _turns(value, column)
    return [{"role": role, "content": _string(value, column)}]


def _turns(value: object, column: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise _BadRowError(f"has no list of messages in {column}; give {{role, content}} objects")
    return [_turn(turn, f"{column}[{i}]") for i, turn in enumerate(value)]


def _turn(value: object, place: str) -> dict[str, Any]:
    """A message with its role and its text, from either of the two ways to write one."""
    if not isinstance(value, dict):
        raise _BadRowError(f"has no message in {place}; give a {{role, content}} object")
    turn = {key: entry for key, entry in value.items() if entry is not None}
    if "role" in turn:
        role = _string(turn.pop("role"), f"{place}.role")
        content = turn.pop("content", None)
    else:
        speaker = turn.pop("from", None)
        role = _SHAREGPT.get(speaker, "") if isinstance(speaker, str) else ""
        if not role:
            raise _BadRowError(
                f"has {strict_json.short(speaker)} as speaker of {place}; known are "
                f"{', '.join(_SHAREGPT)}"
            )
        content = turn.pop("value", None)
    if content is None and "tool_calls" in turn:
        content = ""
    if isinstance(content, list):
        content = "\n".join(_part(part, place) for part in content)
    return {**turn, "role": role, "content": _string(content, f"{place}.content")}


def _part(value: object, place: str) -> str:
    if not isinstance(value, dict) or value.get("type") != "text":
        raise _BadRowError(f"has a part in {place} that is not of type text; only text is read")
    return _string(value.get("text"), f"{place}.content.text")


def _string(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise _BadRowError(
            f"has something else than a string in {place}; correct or remove the row"
        )
    return value
