"""Options and progress events of a healing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from sleb_serve.errors import SlebError
from sleb_serve.manifest.schema import Training

DEFAULT_TOKENS = 2_000_000
"""Default training tokens if neither tokens nor minutes are given."""
DEFAULT_LENGTH = 512
"""Default tokens per sequence: short sequences are cheap and sufficient."""


@dataclass(frozen=True)
class HealConfig:
    """Options of `sleb_serve.heal`.

    Attributes:
        texts: the sources to train on, each with its weight: ``wikitext2``, ``c4``,
            ``python-docs``, or files of texts or chats (.txt, .jsonl, .jsonl.gz, .parquet). In
            chats, only the answers are learned.
        tokens: training tokens; None for 2,000,000 unless `minutes` is given.
        minutes: maximum training time.
        rank: rank of each weight's update.
        projections: last name components of the weights to train, such as ``q_proj``; None for all
            linear weights of the kept blocks.
        learning_rate: Adam's peak rate, after a warm-up; decays to zero.
        sequence_length: tokens per sequence; None for 512, or the model's context if shorter.
        batch_size: sequences per step, over all processes.
        sequences_at_once: how many of these pass through the model at once.
        held_out: sequences held out from training for validation.
        patience: validations without improvement before training stops.
        checkpointing: activation checkpointing: less memory, about a third more time.
        further: continue from the manifest's healed updates, at their rank, instead of from zero.
        also: other numbers of removals to heal; the fewest first, and each more begins with the
            updates of the fewer.
        seed: seed for the initial factors and the order of the text.
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
        """Refuse invalid values.

        Raises:
            SlebError: names the value.
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
        """Return the training tokens; None if only time ends the training."""
        if self.tokens is None and self.minutes is None:
            return DEFAULT_TOKENS
        return self.tokens


@dataclass(frozen=True)
class Judgement:
    """Results of a pruned model on held-out text, compared with the dense one.

    Attributes:
        kl: divergence from the dense model's predictions, in nats per token.
        loss: loss in nats per token.
        dense_loss: the dense model's loss.
        agreement: share of positions where both have the same most likely token.
    """

    kl: float
    loss: float
    dense_loss: float
    agreement: float


class Progress:
    """Receives progress events of a healing; does nothing by default."""

    def begins(self, blocks: int, trained: int, size: int) -> None:
        """A healing begins: blocks removed, trainable parameters, bytes of the weights file."""

    def stepped(self, done: float, loss: float, tokens: int) -> None:
        """A step ended: used share of the budget, loss, tokens so far."""

    def judged(self, done: float, judgement: Judgement) -> None:
        """The model was validated on held-out text."""

    def ended(self, blocks: int, training: Training, early: bool) -> None:
        """A healing ended; `early` if it stopped improving."""
