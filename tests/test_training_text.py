"""Training text: shares, order, held-out text, and learned tokens of chats."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import Models
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.data.tokenizer import Chats, Tokenizer, load_tokenizer
from sleb_serve.data.training import Passage, make_mixture
from sleb_serve.errors import SlebError

DIGITS = Tokenizer(lambda text: [ord(letter) for letter in text])


def letters(passage: Passage) -> str:
    return "".join(map(chr, passage.tokens))


def numbered(path: Path, first: str, count: int) -> str:
    """A text in which every four letters are different."""
    path.write_text("".join(f"{first}{i:03}" for i in range(count)))
    return str(path)


@given(weights=st.lists(st.integers(1, 9), min_size=1, max_size=4), count=st.integers(1, 120))
def test_passages_come_by_their_weights(
    tmp_path_factory: pytest.TempPathFactory, weights: list[int], count: int
) -> None:
    """At any place no source is a passage away from its share, and nothing held out is trained."""
    folder = tmp_path_factory.mktemp("texts")
    texts = {
        numbered(folder / f"{i}.txt", "abcd"[i], 90): float(weight)
        for i, weight in enumerate(weights)
    }
    mixture = make_mixture(texts, DIGITS, length=4, most=60, held_out=4, seed=3)
    taken = [letters(passage) for passage in islice(mixture, count)]
    for i, weight in enumerate(weights):
        share = weight / sum(weights) * count
        assert abs(sum(p[0] == "abcd"[i] for p in taken) - share) <= len(weights)
    held = {letters(passage) for passage in mixture.held_out}
    assert len(held) >= len(weights)
    assert not held & set(taken)
    assert taken == [letters(passage) for passage in islice(mixture, count)]


def test_a_short_source_begins_again_in_another_order(tmp_path: Path) -> None:
    text = numbered(tmp_path / "t.txt", "a", 14)
    mixture = make_mixture({text: 1.0}, DIGITS, length=4, most=500, held_out=2)
    taken = [letters(passage) for passage in islice(mixture, 24)]
    assert sorted(taken[:12]) == sorted(taken[12:]) == [f"a{i:03}" for i in range(12)]
    assert taken[:12] != taken[12:]


def test_rows_from_the_hub_stay_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of wikitext2 are lines of articles: each passage is a piece of the joined text."""
    from datasets import Dataset

    lines = [f"line {i}" for i in range(600)]
    data = Dataset.from_dict({"text": lines})
    monkeypatch.setattr("datasets.load_dataset", lambda **_: data)
    mixture = make_mixture({"wikitext2": 1.0}, DIGITS, length=40, most=50, held_out=4, seed=3)
    taken = [letters(passage) for passage in islice(mixture, 50)]
    article = "\n\n".join(lines)
    assert {article.index(passage) % 40 for passage in taken} == {0}
    assert len(set(taken)) == 50
    assert "".join(map(letters, mixture.held_out)) in article


def test_training_text_that_cannot_be_loaded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(**_: Any) -> None:
        raise ConnectionError("no hub")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(SlebError, match=r"no hub; .* or use texts=python-docs"):
        make_mixture({"c4": 1.0}, DIGITS, length=4, most=4, held_out=1)


def write_chats(path: Path, *chats: list[tuple[str, str]]) -> str:
    rows = [
        {"messages": [{"role": role, "content": content} for role, content in chat]}
        for chat in chats
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_of_chats_the_answers_alone_count(smollm2: Path, tmp_path: Path) -> None:
    """By the model's own template: with what ends an answer, without what begins it."""
    tokenizer = load_tokenizer(open_checkpoint(str(smollm2)))
    chat = [
        *(("user", "Where is Paris?"), ("assistant", "In France.")),
        *(("user", "And Rome?"), ("assistant", "In Italy.")),
    ]
    text = write_chats(tmp_path / "c.jsonl", *[chat] * 8)
    mixture = make_mixture({text: 1.0}, tokenizer, length=150, most=2, held_out=1)
    (passage,) = islice(mixture, 1)
    from transformers import AutoTokenizer

    own: Any = AutoTokenizer.from_pretrained(smollm2)
    learned = [t for t, c in zip(passage.tokens, passage.counts, strict=True) if c]
    said = own.decode(learned)
    assert said.startswith("In France.<|im_end|>")
    assert "In Italy.<|im_end|>" in said
    assert "Rome" not in said
    assert "user" not in said
    assert "assistant" not in said
    whole = own.apply_chat_template(
        [{"role": role, "content": content} for role, content in chat], tokenize=False
    )
    assert own.decode(passage.tokens).startswith(whole)


def test_a_template_that_rewrites_earlier_turns_shows_the_last_answer() -> None:
    """As those that strip an earlier answer's thoughts do."""

    def render(messages: list[dict[str, Any]], answer_next: bool) -> str:
        shown = [
            message["content"] if i == len(messages) - 1 else message["content"][-1]
            for i, message in enumerate(messages)
        ]
        return "|".join(shown) + ("|" if answer_next else "")

    tokenizer = Tokenizer(DIGITS.encode, Chats(render, DIGITS.encode))
    from sleb_serve.data import training
    from sleb_serve.data.rows import Row

    said = ["q1", "a1", "q2", "a2"]
    messages = [
        {"role": role, "content": content}
        for role, content in zip(["user", "assistant"] * 2, said, strict=True)
    ]
    assert tokenizer.chats is not None
    row = Row(render(messages, False), messages)
    # Behind what a server would be given, "q2" whole, the text stands no more: nothing is learned
    # rather than something wrong.
    assert list(training._answers(row, tokenizer.chats)) == []


def test_what_gives_no_passage_is_refused(models: Models, tmp_path: Path) -> None:
    short = numbered(tmp_path / "s.txt", "a", 3)
    with pytest.raises(SlebError, match=r"gives 3 sequences of 4 tokens that count, 4 of them"):
        make_mixture({short: 1.0}, DIGITS, length=4, most=9, held_out=4)
    with pytest.raises(SlebError, match="unknown text nothing"):
        make_mixture({"nothing": 1.0}, DIGITS, length=4, most=9, held_out=1)
    chats = write_chats(tmp_path / "c.jsonl", [("user", "No answer to this.")])
    tokenizer = Tokenizer(DIGITS.encode, Chats(lambda m, _: m[0]["content"], DIGITS.encode))
    with pytest.raises(SlebError, match="gives 0 sequences"):
        make_mixture({chats: 1.0}, tokenizer, length=4, most=9, held_out=1)
