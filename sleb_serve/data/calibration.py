"""Calibration text: tokenised as one text and cut into sequences of token ids."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sleb_serve.data.rows import read_rows
from sleb_serve.data.texts import (
    DEFAULT_ROWS,
    EMBEDDED,
    HUB_TEXTS,
    JUDGED_TEXTS,
    HubText,
    embedded_text,
)
from sleb_serve.data.tokenizer import Tokenize, Tokenizer
from sleb_serve.errors import SlebError, first_line
from sleb_serve.manifest.schema import Calibration

_JUDGED_C4_WINDOWS = 256

BETWEEN_ROWS = "\n\n"


@dataclass(frozen=True)
class Sequences:
    """Token sequences of equal length, and their source."""

    tokens: tuple[tuple[int, ...], ...]
    calibration: Calibration


def make_sequences(
    source: str,
    tokenizer: Tokenizer,
    *,
    sequences: int | None,
    sequence_length: int,
    seed: int = 0,
    rows: int | None = None,
    sample: int = 0,
) -> Sequences:
    """Cut `source` into consecutive sequences of token ids.

    Args:
        source: ``wikitext2`` or ``c4`` (rows shuffled by `seed`, the first `rows` joined, as the
            official code does), ``python-docs`` (embedded), or a .txt, .jsonl, .jsonl.gz or
            .parquet file (its rows of text or chats from the start).
        tokenizer: the model's tokenizer. A text that begins with a chat gets only the special
            tokens of the chat template, as in serving.
        sequences: maximum number; None for all from the rows (8 for other sources).
        sequence_length: tokens per sequence, at least 2.
        seed: seed for shuffling the rows of ``wikitext2`` and ``c4``.
        rows: number of rows of ``wikitext2`` and ``c4``; None for 128, or more if `sequences`
            sequences need them.
        sample: number of the sample, all of equal size: further seeds after `seed` select other
            rows; for other sources, the following sequences.

    Raises:
        SlebError: the source is unknown, unreadable, empty or too short.
    """
    if sequence_length < 2:
        raise SlebError(
            f"sequence_length={sequence_length}: a sequence needs at least 2 tokens, one to read "
            f"and one to predict"
        )
    if sequences is not None and sequences < 1:
        raise SlebError(f"sequences={sequences}: at least one sequence is needed")
    if source in HUB_TEXTS:
        first, seed = 0, seed + sample
        ids, rows = _hub_tokens(source, tokenizer, sequences, sequence_length, seed, rows)
    else:
        if rows is not None:
            raise SlebError(f"`rows` is for {' and '.join(HUB_TEXTS)}; {source} has no rows")
        sequences = sequences or 8
        first = sample * sequences
        ids = _tokens(tokenizer, source, (first + sequences) * sequence_length)
    tokens = _cut(ids, source, sequence_length, first, sequences)
    return Sequences(
        tokens,
        Calibration(
            source=source,
            split=HUB_TEXTS[source].split if source in HUB_TEXTS else None,
            sequences=len(tokens),
            sequence_length=sequence_length,
            seed=seed,
            tokens_sha256=_digest(tokens),
            rows=rows,
        ),
    )


def _cut(
    ids: Sequence[int], source: str, length: int, first: int, count: int | None
) -> tuple[tuple[int, ...], ...]:
    """Cut consecutive sequences of `length` tokens; all if `count` is None."""
    available = len(ids) // length
    if available == 0:
        raise SlebError(
            f"text {source} has {len(ids)} tokens, less than one sequence of "
            f"{length}; give more text or a smaller `sequence_length`"
        )
    if count is not None and available < first + count:
        raise SlebError(
            f"text {source} gives {available} sequences of {length} tokens, "
            f"{first + count} were asked for; give more text or smaller `sequences`"
        )
    last = available if count is None else first + count
    return tuple(tuple(ids[i * length : (i + 1) * length]) for i in range(first, last))


def source_tokens(source: str, tokenizer: Tokenizer, wanted: int) -> Sequence[int]:
    """Return up to `wanted` first tokens of a text, with its rows in their own order.

    The rows of ``wikitext2`` are lines of articles; shuffled ones have no context to learn from.

    Raises:
        SlebError: the source is unknown, unreadable or empty.
    """
    if source in HUB_TEXTS:
        rows = _load(source, HUB_TEXTS[source], f"use texts={EMBEDDED}")
        return _row_tokens(rows, HUB_TEXTS[source], tokenizer, wanted)[0][:wanted]
    return _tokens(tokenizer, source, wanted)[:wanted]


def judged_sequences(
    source: str, tokenizer: Tokenizer, length: int, count: int | None = None
) -> tuple[tuple[int, ...], ...]:
    """Cut consecutive sequences of an evaluation text, as in the official code.

    Args:
        source: ``wikitext2`` (its test split), ``c4`` (256 sequences of the first 1,100 rows of its
            validation split), ``python-docs`` or a file.
        tokenizer: the model's tokenizer; see `make_sequences`.
        length: tokens per sequence.
        count: maximum number of sequences; None for all.

    Raises:
        SlebError: the text does not exist or is shorter than one sequence.
    """
    if source in JUDGED_TEXTS:
        hub = JUDGED_TEXTS[source]
        data = _load(source, hub, "give another `perplexity` text")
        ids = tokenizer(hub.separator.join(data[: hub.rows]["text"]))
        if source == "c4":
            ids = ids[: _JUDGED_C4_WINDOWS * length]
    else:
        ids = _tokens(tokenizer, source, None if count is None else count * length)
    available = len(ids) // length
    if available == 0:
        raise SlebError(
            f"text {source} has {len(ids)} tokens, less than one sequence of {length}; give more "
            f"text or a smaller `sequence_length`"
        )
    if count is not None:
        available = min(count, available)
    return tuple(tuple(ids[i * length : (i + 1) * length]) for i in range(available))


def held_out_sequences(
    tokenize: Tokenize, count: int, length: int, calibration: Calibration | None
) -> tuple[tuple[int, ...], ...]:
    """Return the last `count` sequences of `length` tokens of the embedded text.

    Raises:
        SlebError: they would overlap with `calibration`, which uses its start.
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
            f"{count} sequences of {length} tokens of {EMBEDDED} would overlap the calibration's; "
            f"ask for fewer `perplexity_sequences`"
        )
    return tuple(tuple(ids[start + i * length : start + (i + 1) * length]) for i in range(count))


def _digest(sequences: Sequence[Sequence[int]]) -> str:
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(b"".join(token.to_bytes(8, "little", signed=True) for token in sequence))
    return digest.hexdigest()


def _tokens(tokenizer: Tokenizer, source: str, wanted: int | None) -> Sequence[int]:
    """Tokenise at least `wanted` tokens from the start of a text; None for all.

    This avoids tokenising gigabytes to use the first page. The last few tokens of a prefix may
    differ from the whole text's, so a margin is cut off.
    """
    rows = read_rows(source, tokenizer.chats)
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
        text = BETWEEN_ROWS.join(texts)
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
        raise SlebError(f"rows={rows}: at least one row is needed")
    hub = HUB_TEXTS[source]
    data = _load(source, hub, f"use calibration={EMBEDDED}").shuffle(seed=seed)
    wanted = None if sequences is None or rows is not None else sequences * sequence_length
    return _row_tokens(data, hub, tokenize, wanted, rows or DEFAULT_ROWS)


def _row_tokens(
    data: Any, hub: HubText, tokenize: Tokenize, wanted: int | None, count: int = DEFAULT_ROWS
) -> tuple[Sequence[int], int]:
    """Tokenise the first `count` rows, or more for `wanted` tokens; return the number of rows."""
    count = min(count, len(data))
    while True:
        text = hub.separator.join(data[:count]["text"])
        ids = tokenize(text) if text.strip() else []
        if wanted is None or len(ids) >= wanted or count == len(data):
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
