"""Options and progress events of a selection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sleb_serve.errors import SlebError
from sleb_serve.manifest.schema import OBJECTIVES

if TYPE_CHECKING:
    from sleb_serve.data.calibration import Sequences
    from sleb_serve.roofline.target import SpeedTarget
    from sleb_serve.selection.repair import Gap
    from sleb_serve.selection.search import Step

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Compute dtypes; ``auto`` is the checkpoint's own."""

SEARCHES = ("greedy", "fast")
"""Exactly the official algorithm's result; or the same with a probability of 95 %."""


_MOST_SEEDS = 1000


@dataclass(frozen=True)
class SelectConfig:
    """Options of `sleb_serve.select`.

    Attributes:
        remove: number of blocks (an int) or share of them (a float below 1, rounded up); an upper
            limit with `until`. None if `until` or `target` determine it.
        target: remove as many blocks as a speed-up needs according to the roofline.
        until: remove blocks while the perplexity on the calibration text is below this multiple of
            the dense model's.
        calibration: ``wikitext2``, ``c4``, ``python-docs``, or a file of texts or chats (.txt,
            .jsonl, .jsonl.gz, .parquet).
        sequences: number of text sequences; None for all from the rows, or 8 for a file.
        sequence_length: tokens per sequence; None for 2,048, or the model's context if shorter.
        rows: rows of ``wikitext2`` or ``c4``; None for 128, or as many as `sequences` needs.
        seed: shuffles the rows.
        early_barrier: number of first blocks to keep (section 3.2 of the paper).
        late_barrier: number of last blocks to keep.
        dtype: one of `DTYPES`; ``auto`` runs a 16-bit model in float32 on a CPU without native
            support for its dtype.
        search: one of `SEARCHES`.
        objective:
            ``nll``, the loss on the text; ``kl``, the divergence from the dense model's
            predictions; ``embedding``, the distance of a pooling model's embeddings. None for
            ``nll``, or ``embedding`` if the model predicts no tokens.
        seeds: repeat the search on this many samples of the text and record the other results.
        repair: ``none``, or ``fold``: fit the block before each gap to the removed blocks.
        repair_sequences: sequences to fit on; None for `sequences`.
        memory_budget: bytes; None for four fifths of the free memory. Weights that do not fit are
            read from disk layer by layer.
        revision: branch, tag or commit of a hub model.
    """

    remove: int | float | None = None
    calibration: str | Path = "wikitext2"
    sequences: int | None = None
    sequence_length: int | None = None
    rows: int | None = None
    seed: int = 0
    early_barrier: int = 1
    late_barrier: int = 1
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    search: Literal["greedy", "fast"] = "greedy"
    objective: Literal["nll", "kl", "embedding"] | None = None
    seeds: int = 1
    repair: Literal["none", "fold"] = "none"
    repair_sequences: int | None = None
    until: float | None = None
    target: SpeedTarget | None = None
    memory_budget: int | None = None
    revision: str | None = None

    def check(self) -> None:
        """Refuse invalid values.

        Raises:
            SlebError: names the value and the alternatives.
        """
        for name, known in (
            ("dtype", DTYPES),
            ("search", SEARCHES),
            ("objective", (None, *OBJECTIVES)),
            ("repair", ("none", "fold")),
        ):
            value = getattr(self, name)
            if value not in known:
                there = ", ".join(str(entry) for entry in known if entry is not None)
                raise SlebError(f"{name}={value}: choose one of {there}")
        if self.remove is None and self.until is None and self.target is None:
            raise SlebError("how many blocks? give `remove`, `until` or `target_speedup`")
        if self.remove is not None and self.target is not None:
            raise SlebError("`remove` and `target_speedup` both say how many blocks; give one")
        if self.until is not None and not 1 < self.until < math.inf:
            raise SlebError(f"until={self.until}: give a number above 1")
        if self.until is not None and self.objective not in (None, "nll"):
            raise SlebError(f"`until` is a perplexity, objective={self.objective} measures none")
        if not 1 <= self.seeds <= _MOST_SEEDS:
            raise SlebError(f"seeds={self.seeds}: give 1 to {_MOST_SEEDS} samples of the text")

    @property
    def method(self) -> str:
        """Return the name of the search in the manifest."""
        return "sleb" if self.search == "greedy" else f"sleb-{self.search}"


class Progress:
    """Receives progress events of a selection; does nothing by default."""

    def loaded(self, sequences: Sequences, resumed: Sequence[Step], how: str) -> None:
        """The model and the text are loaded; these steps are resumed."""

    def reading(self, done: int, total: int) -> None:
        """So many bytes of the weights are read for their full digest."""

    def aimed(self, target: SpeedTarget, blocks: int) -> None:
        """The number of blocks for a speed-up is known."""

    def step_begins(self, number: int, candidates: int, layers: int) -> None:
        """A step begins: its candidates and its runs of a layer on a sequence's states."""

    def advance(self) -> None:
        """A layer ran on the states of one sequence."""

    def step_ended(self, number: int, step: Step) -> None:
        """A step ended and was logged."""

    def repaired(self, gaps: Sequence[Gap], loss: float) -> None:
        """The gaps were repaired, with this calibration loss."""
