"""The loss: how far the student's predictions are from the teacher's, over the whole vocabulary.

Logits of all tokens at once would be the largest tensor by far (2,048 tokens of a vocabulary of
128,256 are 1 GiB in float32), so both models' are made for a few tokens at a time, and with them
the gradient of what enters the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sleb_serve.data.training import Passage
from sleb_serve.healing.config import Judgement
from sleb_serve.healing.twin import Twin

_PARTS = 24
"""In so many parts go a batch's tokens through the head: a handful of such logits are held at once,
and all of them would be more than all else."""
_FEWEST = 64
"""Tokens a part, or the head would be read too often."""


def tensors(passages: Sequence[Passage], device: Any) -> tuple[Tensor, Tensor]:
    """Token ids [B, T], and which of them are to be predicted, [B, T]; never the first."""
    ids = torch.tensor([list(passage.tokens) for passage in passages], device=device)
    counts = torch.tensor([list(passage.counts) for passage in passages], device=device).bool()
    counts[:, 0] = False
    return ids, counts


def predicted(passages: Sequence[Passage]) -> int:
    """How many tokens are to be predicted."""
    return sum(sum(passage.counts[1:]) for passage in passages)


def learn(twin: Twin, passages: Sequence[Passage], total: int) -> Tensor:
    """Add the gradients of some passages' loss to those that the student's factors have.

    Args:
        twin: teacher and student.
        passages: the text.
        total: tokens that the loss is the mean of; more than these, if these are a part of a step.

    Returns:
        The passages' part of the loss, KL(teacher || student) in nats a token.
    """
    ids, counts = tensors(passages, twin.device)
    with twin.teacher(), twin.autocast():
        goal = _chosen(twin.hidden(ids), counts)
    with twin.student():
        with twin.autocast():
            hidden = twin.hidden(ids)
        given = _chosen(hidden, counts)
        gradient, loss = torch.empty_like(given), torch.zeros((), device=given.device)
        size = max(_FEWEST, len(given) // _PARTS)
        for start in range(0, len(given), size):
            part = slice(start, start + size)
            piece = given[part].detach().requires_grad_()
            with torch.no_grad(), twin.autocast():
                wanted = twin.logits(goal[part]).log_softmax(-1)
            with twin.autocast():
                found = twin.logits(piece).log_softmax(-1)
            nats = nn.functional.kl_div(found, wanted, reduction="sum", log_target=True) / total
            nats.backward()
            gradient[part] = piece.grad
            loss += nats.detach()
        given.backward(gradient)
    return loss


def _chosen(hidden: Tensor, counts: Tensor) -> Tensor:
    """Of [B, T, h], where the next token is to be predicted: [N, h]."""
    # The model may be spread over devices: its end need not be where its tokens are.
    return hidden[:, :-1][counts[:, 1:].to(hidden.device)]


@torch.no_grad()
def judge(twin: Twin, passages: Sequence[Passage]) -> Tensor:
    """Sums over the tokens to predict: [KL, student's nats, teacher's nats, agreements, tokens]."""
    ids, counts = tensors(passages, twin.device)
    with twin.teacher(), twin.autocast():
        goal = _chosen(twin.hidden(ids), counts)
    with twin.student(), twin.autocast():
        given = _chosen(twin.hidden(ids), counts)
    targets = ids[:, 1:][counts[:, 1:]].to(given.device)
    sums = torch.zeros(5, dtype=torch.float64, device=given.device)
    size = max(_FEWEST, len(given) // _PARTS)
    for start in range(0, len(given), size):
        part = slice(start, start + size)
        with twin.autocast():
            wanted = twin.logits(goal[part]).log_softmax(-1)
            found = twin.logits(given[part]).log_softmax(-1)
        right = targets[part, None]
        sums += torch.stack(
            [
                nn.functional.kl_div(found, wanted, reduction="sum", log_target=True),
                -found.gather(1, right).sum(),
                -wanted.gather(1, right).sum(),
                (found.argmax(-1) == wanted.argmax(-1)).sum(),
                torch.tensor(len(right), device=found.device),
            ]
        ).double()
    return sums


def judgement(sums: Sequence[float]) -> Judgement:
    """The means, of the sums over all held-out passages."""
    kl, loss, dense_loss, agreements, tokens = sums
    return Judgement(kl / tokens, loss / tokens, dense_loss / tokens, agreements / tokens)
