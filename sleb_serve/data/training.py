"""Training text: weighted sources cut into sequences, with a mask of the learned tokens.

In a chat, only the assistant's messages are learned; the rest is input.
"""

from __future__ import annotations

import contextlib
import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sleb_serve.data.calibration import source_tokens
from sleb_serve.data.rows import Row, is_chats, read_rows
from sleb_serve.data.tokenizer import Chats, Tokenizer
from sleb_serve.errors import SlebError


@dataclass(frozen=True)
class Passage:
    """A sequence of token ids, with 1 for each token to learn and 0 for the others.

    Uses five bytes per token instead of forty for Python integers.
    """

    tokens: array[int]
    counts: bytes


@dataclass(frozen=True)
class Mixture:
    """Passages of equal length from several sources.

    Attributes:
        sources: training passages of each source.
        weights: relative frequency of each source.
        held_out: passages of all sources that are held out from training.
        seed: seed for shuffling the passages.
    """

    sources: tuple[tuple[Passage, ...], ...]
    weights: tuple[float, ...]
    held_out: tuple[Passage, ...]
    seed: int = 0

    def __iter__(self) -> Iterator[Passage]:
        """Yield passages forever, reshuffling each source whenever it restarts."""
        streams = [self._stream(number) for number in range(len(self.sources))]
        taken = [0] * len(streams)
        total = sum(self.weights)
        while True:
            # Next comes the source that is furthest behind its share.
            behind = [
                weight / total * (sum(taken) + 1) - count
                for weight, count in zip(self.weights, taken, strict=True)
            ]
            number = behind.index(max(behind))
            taken[number] += 1
            yield next(streams[number])

    def _stream(self, number: int) -> Iterator[Passage]:
        shuffle = random.Random(f"{self.seed}/{number}").shuffle
        order = list(self.sources[number])
        while True:
            shuffle(order)
            yield from order


def make_mixture(
    texts: Mapping[str, float],
    tokenizer: Tokenizer,
    *,
    length: int,
    most: int,
    held_out: int,
    seed: int = 0,
) -> Mixture:
    """Cut texts into passages.

    Args:
        texts: each source (see `sleb_serve.data.calibration.make_sequences`) with its weight.
        tokenizer: the model's.
        length: tokens per passage.
        most: training passages in total; shorter sources are repeated.
        held_out: held-out passages in total.
        seed: seed for shuffling passages.

    Raises:
        SlebError: a source is unknown, unreadable, or too short.
    """
    total = sum(texts.values())
    sources: list[tuple[Passage, ...]] = []
    kept: list[Passage] = []
    for source, weight in texts.items():
        held = max(1, round(held_out * weight / total))
        wanted = held + max(1, round(most * weight / total))
        passages = _passages(source, tokenizer, length, wanted)
        if len(passages) <= held:
            raise SlebError(
                f"text {source} gives {len(passages)} sequences of {length} tokens that count, "
                f"{held} of them are held out and at least one is trained on; give more text or "
                f"a smaller `sequence_length` or `held_out`"
            )
        sources.append(passages[:-held])
        kept += passages[-held:]
    return Mixture(tuple(sources), tuple(texts.values()), tuple(kept), seed)


def _passages(source: str, tokenizer: Tokenizer, length: int, most: int) -> tuple[Passage, ...]:
    """Return up to `most` consecutive passages; skip those without learned tokens."""
    counts: bytes | bytearray
    if is_chats(source, tokenizer.chats):
        ids, counts = _chat_tokens(source, tokenizer, most * length)
    else:
        ids = source_tokens(source, tokenizer, most * length)
        counts = b"\1" * len(ids)
    cut = (
        Passage(array("i", ids[start : start + length]), bytes(counts[start : start + length]))
        for start in range(0, len(ids) - length + 1, length)
    )
    # The first token of a passage is not predicted.
    return tuple(passage for passage in cut if any(passage.counts[1:]))[:most]


def _chat_tokens(
    source: str, tokenizer: Tokenizer, wanted: int
) -> tuple[Sequence[int], bytes | bytearray]:
    """Tokenise a file's chats until at least `wanted` tokens.

    Prompt and answer are encoded separately, as in serving.
    """
    chats = tokenizer.chats
    assert chats is not None
    ids: list[int] = []
    counts = bytearray()
    for row in read_rows(source, chats):
        if len(ids) >= wanted:
            break
        end = 0
        for first, last in _answers(row, chats):
            for text, is_answer in (row.text[end:first], False), (row.text[first:last], True):
                part = chats.encode(text)
                ids += part
                counts += bytes([is_answer]) * len(part)
            end = last
        rest = chats.encode(row.text[end:])
        ids += rest
        counts += bytes([not row.is_chat]) * len(rest)
    return ids, counts


def _answers(row: Row, chats: Chats) -> Iterator[tuple[int, int]]:
    """Find the assistant's messages in the rendered text, after the input that a server would get.

    If the template renders earlier turns differently once later ones exist, use only the last.
    """
    messages = row.messages or []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # A template may refuse an unfinished chat.
        with contextlib.suppress(Exception):
            before = chats.render(messages[:place], True)
            after = chats.render(messages[: place + 1], False)
            if row.text.startswith(before) and row.text.startswith(after):
                yield len(before), len(after)
