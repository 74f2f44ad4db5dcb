"""A model's tokenizer and its maximum sequence length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.errors import SlebError, first_line

Tokenize = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Chats:
    """A model's chat format.

    Attributes:
        render: format a chat's messages as one text with the chat template, optionally followed by
            the beginning of an answer.
        encode: convert such a text to token ids, with only the special tokens that it contains.
    """

    render: Callable[[list[dict[str, Any]], bool], str]
    encode: Tokenize


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer.

    Attributes:
        encode: text to token ids, with the special tokens that the tokenizer adds.
        chats: the chat format; None without a chat template.
    """

    encode: Tokenize
    chats: Chats | None = None

    def __call__(self, text: str) -> Sequence[int]:
        """Convert text to token ids, with the special tokens that the tokenizer adds."""
        return self.encode(text)


OFFICIAL_SEQUENCE_LENGTH = 2048
"""The official code's sequence length, unless the model's context is shorter."""


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Load the checkpoint's own tokenizer.

    Raises:
        SlebError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(checkpoint.path))
    except Exception as error:
        raise SlebError(
            f"cannot load the tokenizer of {checkpoint.path}: {first_line(error)}; the folder "
            f"must hold the tokenizer's files too"
        ) from error

    def encode(text: str, special: bool = True) -> list[int]:
        # verbose=False: long texts are cut into sequences before the model sees them.
        return list(tokenizer(text, verbose=False, add_special_tokens=special)["input_ids"])

    def render(messages: list[dict[str, Any]], answer_next: bool) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer_next
            )
        )

    # The template writes the special tokens itself; serving does not add a second BOS.
    chats = Chats(render, partial(encode, special=False))
    return Tokenizer(encode, chats if tokenizer.chat_template else None)


def context_length(checkpoint: Checkpoint) -> int:
    """Return the config's maximum position count; 2,048 without one."""
    for key in ("max_position_embeddings", "n_positions", "seq_length", "max_sequence_length"):
        value = checkpoint.decoder_config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return OFFICIAL_SEQUENCE_LENGTH


def sequence_length(
    checkpoint: Checkpoint, asked: int | None, default: int = OFFICIAL_SEQUENCE_LENGTH
) -> int:
    """Return the tokens per sequence: those asked for, or the default if the context allows it.

    Raises:
        SlebError: `asked` is less than 2 or more than the model's context.
    """
    context = context_length(checkpoint)
    if asked is None:
        return min(default, context)
    if asked < 2:
        raise SlebError(
            f"sequence_length={asked}: a sequence needs at least 2 tokens, one to read and one to "
            f"predict"
        )
    if asked > context:
        raise SlebError(
            f"sequence_length={asked} is more than the model's context of {context} tokens; ask "
            f"for less"
        )
    return asked
