"""Calibration text: a source, tokenised as one text, cut into consecutive windows of token ids."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleb_serve.errors import SlebError, first_line
from sleb_serve.manifest import Calibration

Tokenize = Callable[[str], Sequence[int]]

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


@dataclass(frozen=True)
class Windows:
    """Token windows, all of the same length, and where they came from."""

    tokens: tuple[tuple[int, ...], ...]
    calibration: Calibration


def make_windows(
    source: str,
    tokenize: Tokenize,
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
            .parquet file (its text from the start).
        tokenize: text to token ids, special tokens as the model's tokenizer adds them.
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
        ids, rows = _hub_tokens(source, tokenize, sequences, sequence_length, seed, rows)
    else:
        if rows is not None:
            raise SlebError(f"--rows is for {' and '.join(HUB_TEXTS)}; {source} has no rows")
        text = embedded_text() if source == EMBEDDED else _file_text(source)
        sequences = sequences or 8
        first = sample * sequences
        ids = _tokens(tokenize, text, source, (first + sequences) * sequence_length)
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
    source: str, tokenize: Tokenize, length: int, count: int | None = None
) -> tuple[tuple[int, ...], ...]:
    """Consecutive windows of a text that models are judged on, as the official code cuts them.

    Args:
        source: ``wikitext2`` (its test split), ``c4`` (256 windows of the first 1,100 rows of its
            validation split), ``python-docs`` or a file.
        tokenize: text to token ids.
        length: tokens a window.
        count: how many windows at most; None for all.

    Raises:
        SlebError: the text is not there, or shorter than one window.
    """
    if source in JUDGED_TEXTS:
        hub = JUDGED_TEXTS[source]
        data = _load(source, hub, "give another --perplexity text")
        ids = tokenize(hub.separator.join(data[: hub.rows]["text"]))
        if source == "c4":
            ids = ids[: _JUDGED_C4_WINDOWS * length]
    else:
        text = embedded_text() if source == EMBEDDED else _file_text(source)
        ids = tokenize(text) if count is None else _tokens(tokenize, text, source, count * length)
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


def _tokens(tokenize: Tokenize, text: str, source: str, wanted: int) -> Sequence[int]:
    """At least `wanted` tokens from the start of `text`, if it has them.

    Tokenising a file of gigabytes to use its first page would be waste. A prefix of the text is
    enough: its last few tokens may differ from the whole text's, so a margin is cut off.
    """
    if not text.strip():
        raise SlebError(f"text {source} is empty; give a file with text in it")
    margin = 64
    length = 8 * (wanted + margin)
    while length < len(text):
        ids = tokenize(text[:length])
        if len(ids) >= wanted + margin:
            return ids[:wanted]
        length *= 2
    return tokenize(text)


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


def _file_text(source: str) -> str:
    path = Path(source)
    readers: dict[str, Callable[[Path], Iterator[str]]] = {
        ".txt": lambda file: iter([file.read_text(encoding="utf-8")]),
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
        return "\n\n".join(reader(path))
    except UnicodeDecodeError as error:
        raise SlebError(
            f"text {source} is not UTF-8 (byte {error.start}); convert it first"
        ) from error
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise SlebError(
            f"cannot read text {source}: {first_line(error)}; rows need a column named text"
        ) from error


def _jsonl_rows(path: Path) -> Iterator[str]:
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        for number, row in enumerate(file, 1):
            if row.strip():
                entry = json.loads(row)
                if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
                    raise ValueError(f"line {number} has no text")
                yield entry["text"]


def _parquet_rows(path: Path) -> Iterator[str]:
    import pyarrow.parquet

    yield from pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()
