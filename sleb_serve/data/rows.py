"""Rows of a file: texts, or chats in common formats."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleb_serve.data.texts import EMBEDDED, HUB_TEXTS, embedded_text
from sleb_serve.data.tokenizer import Chats
from sleb_serve.errors import SlebError, first_line
from sleb_serve.utils import strict_json
from sleb_serve.utils.limited import read_limited

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


_MAX_TEXT = 1 << 30
_MAX_ROW = 64 << 20
"""Maximum characters in a line of JSON."""


_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class BadRowError(Exception):
    """An unreadable row: the problem and the remedy; the row number precedes the message."""


@dataclass(frozen=True)
class Row:
    """One row of a file as text, with its messages if it is a chat."""

    text: str
    messages: list[dict[str, Any]] | None = None

    @property
    def is_chat(self) -> bool:
        """Return whether the row is a chat."""
        return self.messages is not None


def read_rows(source: str, chats: Chats | None) -> Iterator[Row]:
    """Yield the rows of a text that is not a hub data set."""
    if source == EMBEDDED:
        yield Row(embedded_text())
        return
    path = Path(source)
    readers: dict[str, Callable[[Path], Iterator[tuple[str, object]]]] = {
        ".txt": _whole_text,
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
            except BadRowError as error:
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


def _whole_text(path: Path) -> Iterator[tuple[str, object]]:
    yield "it", {"text": read_limited(path, _MAX_TEXT).decode("utf-8")}


def _jsonl_rows(path: Path) -> Iterator[tuple[str, object]]:
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig") as file:
        # A compressed line can expand to a thousand times the file's size.
        for number, row in enumerate(iter(lambda: file.readline(_MAX_ROW + 1), ""), 1):
            if len(row) > _MAX_ROW:
                raise ValueError(f"line {number} is longer than {_MAX_ROW >> 20} MiB")
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


def _row(entry: object, chats: Chats | None) -> Row:
    """Convert a row to text.

    Raises:
        BadRowError: its kind is unknown, or it is malformed.
    """
    if not isinstance(entry, dict):
        raise BadRowError(f"is not an object; rows need {_KNOWN_ROWS}")
    # Every row of a parquet file has all columns.
    entry = {key: value for key, value in entry.items() if value is not None}
    if "text" in entry:
        row = Row(_string(entry["text"], "text"))
    else:
        messages = _messages(entry)
        if messages is None:
            columns = strict_json.short(list(entry)) if entry else "no values"
            raise BadRowError(f"has none of the columns known here, but {columns}: {_KNOWN_ROWS}")
        if chats is None:
            raise BadRowError(
                "is a chat, and the tokenizer has no chat template; give rows with a column named "
                "text, or put chat_template.jinja beside the tokenizer"
            )
        try:
            row = Row(chats.render(messages, False), messages)
        except Exception as error:
            raise BadRowError(
                f"is refused by the chat template: {first_line(error)}; change or remove the row"
            ) from error
    try:
        row.text.encode()
    except UnicodeEncodeError as error:
        raise BadRowError("has a lone surrogate, which is no text; remove the row") from error
    return row


def is_chats(source: str, chats: Chats | None) -> bool:
    """Return whether a text begins with a chat.

    Raises:
        SlebError: it cannot be read.
    """
    if source in HUB_TEXTS:
        return False
    first = next(read_rows(source, chats), None)
    return first is not None and first.is_chat


def _messages(entry: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return a row's chat for a chat template; None without a known kind of chat."""
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
        raise BadRowError(f"has no list of messages in {column}; give {{role, content}} objects")
    return [_turn(turn, f"{column}[{i}]") for i, turn in enumerate(value)]


def _turn(value: object, place: str) -> dict[str, Any]:
    """Parse a message's role and text from either common format."""
    if not isinstance(value, dict):
        raise BadRowError(f"has no message in {place}; give a {{role, content}} object")
    turn = {key: entry for key, entry in value.items() if entry is not None}
    if "role" in turn:
        role = _string(turn.pop("role"), f"{place}.role")
        content = turn.pop("content", None)
    else:
        speaker = turn.pop("from", None)
        role = _SHAREGPT.get(speaker, "") if isinstance(speaker, str) else ""
        if not role:
            raise BadRowError(
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
        raise BadRowError(f"has a part in {place} that is not of type text; only text is read")
    return _string(value.get("text"), f"{place}.content.text")


def _string(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise BadRowError(f"has something else than a string in {place}; correct or remove the row")
    return value
