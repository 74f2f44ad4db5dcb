"""A state's loss over the vocabulary in parts, with float32 logits of a few rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sleb_serve.models.layerwise import CausalLM
from sleb_serve.selection.racing import SEGMENT_TOKENS

LOGITS_BYTES = 64 << 20
"""Default maximum of float32 logits held at a time."""
_FIRST_SHARE = 12
"""The first part of the vocabulary is one in this many rows; each further part is as large as all
before it.
"""


@dataclass(frozen=True)
class Dense:
    """The dense model's predictions on one sequence.

    Attributes:
        normed: input of its head, [T, h].
        sums: log-sum-exp of its logits, [T].
    """

    normed: Tensor
    sums: Tensor


@dataclass
class Tally:
    """Partial loss of one state on one sequence over the rows so far, a lower bound.

    Attributes:
        normed: input of the head, [T, h]; None if dropped to save memory.
        sums: log-sum-exp of the logits so far, [T].
        target: logit of the predicted token, [T]; against a dense model, the mean logit weighted by
            its predictions, plus their entropy.
        parts: number of parts so far.
    """

    normed: Tensor | None
    sums: Tensor | None = None
    target: Tensor | None = None
    parts: int = 0

    @property
    def nats(self) -> Tensor:
        """Return nats per predicted token, [T], or a lower bound while rows are missing."""
        assert self.sums is not None
        return self.sums - self.target

    @property
    def mean(self) -> float:
        """Return the mean of `nats`."""
        return float(self.nats.double().mean())

    def segments(self) -> list[float]:
        """Return the mean nats of each text segment."""
        return [float(part.double().mean()) for part in self.nats.split(SEGMENT_TOKENS)]


class Vocabulary:
    """The head's rows of a model, in pieces that fit in memory.

    Args:
        model: the model.
        logits_bytes: bytes of float32 logits held at a time.
    """

    def __init__(self, model: CausalLM, logits_bytes: int = LOGITS_BYTES) -> None:
        self.model = model
        self._bytes = logits_bytes

    def rows_at_once(self, tokens: int) -> int:
        """Return how many rows to compute at once for a number of tokens."""
        if not self.model.row_wise:
            return self.model.vocabulary
        return max(64, min(self._bytes // (4 * tokens), self.model.vocabulary))

    def parts(self, normed: Tensor, targets: Tensor) -> list[Tensor]:
        """Split the rows into parts, with the dense model's likely rows first.

        Args:
            normed: input of the dense model's head, [T, h].
            targets: the tokens to predict, [T]; the first part contains all of them.
        """
        everything = torch.arange(self.model.vocabulary, device=targets.device)
        if not self.model.row_wise:
            return [everything]
        pieces = everything.split(self.rows_at_once(len(normed)))
        heads = [self.model.head_rows(slice(int(p[0]), int(p[-1]) + 1)) for p in pieces]
        logs = [self.model.logits(normed, head).float().logsumexp(1) for head in heads]
        total = torch.stack(logs).logsumexp(0)[:, None]
        mass = torch.cat(
            [(self.model.logits(normed, head).float() - total).exp_().sum(0) for head in heads]
        )
        mass[targets] = torch.inf
        order = mass.argsort(descending=True)
        size = -(-self.model.vocabulary // _FIRST_SHARE)
        size = max(size, len(targets.unique()))
        parts = [order[:size]]
        while size < len(order):
            parts.append(order[size : 2 * size])
            size *= 2
        return parts

    def dense(self, normed: Tensor) -> Dense:
        """Return a model's predictions for the head's input `normed`, [T, h]."""
        tally = Tally(normed)
        everything = torch.arange(self.model.vocabulary, device=normed.device)
        self.add(tally, [everything], torch.zeros_like(normed[:, 0], dtype=torch.long))
        assert tally.sums is not None
        return Dense(normed, tally.sums)

    def add(
        self,
        tally: Tally,
        parts: Sequence[Tensor],
        targets: Tensor,
        dense: Dense | None = None,
    ) -> None:
        """Add the next part of the rows to a tally, against the tokens or a dense model."""
        rows, normed = parts[tally.parts], tally.normed
        assert normed is not None
        sums = []
        for piece in rows.split(self.rows_at_once(len(normed))):
            head = self.model.head_rows(piece) if self.model.row_wise else None
            logits = self.model.logits(normed, head).float()
            if dense is not None:
                logs = self.model.logits(dense.normed, head).float() - dense.sums[:, None]
                part = (logs.exp() * (logits - logs)).sum(1)
                tally.target = part if tally.target is None else tally.target + part
            elif tally.parts == 0:
                found = _positions(piece, targets)
                values = logits.gather(1, found.clamp(min=0)[:, None])[:, 0]
                before = torch.zeros_like(values) if tally.target is None else tally.target
                tally.target = torch.where(found >= 0, values, before)
            sums.append(logits.logsumexp(1))
        if tally.sums is not None:
            sums.append(tally.sums)
        tally.sums = torch.stack(sums).logsumexp(0)
        tally.parts += 1

    def loss(self, normed: Tensor, targets: Tensor) -> float:
        """Return the mean nats per predicted token over all rows."""
        tally = Tally(normed)
        everything = torch.arange(self.model.vocabulary, device=targets.device)
        self.add(tally, [everything], targets)
        return tally.mean


def _positions(rows: Tensor, wanted: Tensor) -> Tensor:
    """Return the position of each of `wanted` in `rows`; -1 if missing."""
    found = torch.full((int(torch.maximum(rows.max(), wanted.max())) + 1,), -1, device=rows.device)
    found[rows] = torch.arange(len(rows), device=rows.device)
    return found[wanted]
