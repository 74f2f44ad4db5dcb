"""What a healing is asked for, and who is told how it goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from sleb_serve.errors import SlebError
from sleb_serve.manifest.schema import Training

DEFAULT_TOKENS = 2_000_000
"""Trained on where neither tokens nor minutes are given."""
DEFAULT_LENGTH = 512
"""Tokens a sequence, where none are asked for: short ones are cheap, and enough to learn from."""


@dataclass(frozen=True)
class HealConfig:
    """How `sleb_serve.heal` trains a pruned model.

    Attributes:
        texts: the sources to train on, each with its weight: ``wikitext2``, ``c4``,
            ``python-docs``, or files of texts or chats (.txt, .jsonl, .jsonl.gz, .parquet). Of
            chats, answers alone are learned.
        tokens: how many to train on; None for 2,000,000 where there are no `minutes` either.
        minutes: how long to train at most.
        rank: of the change of each weight.
        projections: last parts of the names of the weights that change, as ``q_proj``; None for
            all linear ones of the blocks that stay.
        learning_rate: the highest, of Adam; it rises first and falls to nothing at the end.
        sequence_length: tokens a sequence; None for 512, or the model's context if shorter.
        batch_size: sequences a step, over all processes.
        sequences_at_once: of them, how many go through the model at once.
        held_out: sequences that are kept from training, to be judged on.
        patience: how many judgements without a better one end it.
        checkpointing: run each layer a second time on the way back rather than keep what happens
            inside; less memory, a quarter more time.
        further: begin with the changes that the manifest was healed with, at their rank; without
            it, with none.
        also: other numbers of removals to heal the manifest for, one after the other.
        seed: draws the first factors, and the order of the text.
        dtype: one of `sleb_serve.selection.config.DTYPES`.
        revision: branch, tag or commit of a hub model.
    """

    texts: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({"wikitext2": 1.0}))
    tokens: int | None = None
    minutes: float | None = None
    rank: int = 32
    projections: tuple[str, ...] | None = None
    learning_rate: float = 1e-3
    sequence_length: int | None = None
    batch_size: int = 16
    sequences_at_once: int = 4
    held_out: int = 16
    patience: int = 5
    checkpointing: bool = True
    further: bool = False
    also: tuple[int, ...] = ()
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    revision: str | None = None

    def check(self) -> None:
        """Refuse values that no training has.

        Raises:
            SlebError: naming the value.
        """
        if not self.texts:
            raise SlebError("`texts` names no text to train on")
        for text, weight in self.texts.items():
            if not 0 < weight < 1e9:
                raise SlebError(f"texts={text}:{weight:g}: a weight is a number above 0")
        for name in ("tokens", "minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1e15:
                raise SlebError(f"{name}={value}: give a number above 0")
        for name in ("rank", "batch_size", "sequences_at_once", "held_out", "patience"):
            value = getattr(self, name)
            if not 1 <= value <= 1 << 20:
                raise SlebError(f"{name}={value}: give a whole number above 0")
        if not 0 < self.learning_rate < 1:
            raise SlebError(f"learning_rate={self.learning_rate}: give a number between 0 and 1")
        if self.sequence_length is not None and self.sequence_length < 2:
            raise SlebError(
                f"sequence_length={self.sequence_length}: a sequence needs at least 2 tokens, one "
                f"to read and one to predict"
            )
        if not 0 <= self.seed < 1 << 32:
            raise SlebError(f"seed={self.seed}: give a whole number between 0 and {(1 << 32) - 1}")

    @property
    def budget(self) -> int | None:
        """Tokens to train on; None where time alone ends it."""
        if self.tokens is None and self.minutes is None:
            return DEFAULT_TOKENS
        return self.tokens


@dataclass(frozen=True)
class Judgement:
    """How a pruned model does on held-out text, beside the dense one.

    Attributes:
        kl: the divergence of its predictions from the dense model's, in nats a token.
        loss: in nats a token.
        dense_loss: the dense model's.
        agreement: the share of tokens where both find the same one the likeliest.
    """

    kl: float
    loss: float
    dense_loss: float
    agreement: float


class Progress:
    """Told how a healing goes; this one does nothing with it."""

    def begins(self, blocks: int, trained: int, size: int) -> None:
        """A model without so many blocks is healed: numbers that change, bytes of a sidecar."""

    def stepped(self, done: float, loss: float, tokens: int) -> None:
        """A step was made: the share of the budget that is used, its loss, tokens so far."""

    def judged(self, done: float, judgement: Judgement) -> None:
        """The model was judged on held-out text."""

    def ended(self, blocks: int, training: Training, early: bool) -> None:
        """A model was healed; `early` if it no longer got better."""
