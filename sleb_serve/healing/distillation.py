"""The distillation loss: divergence from the teacher's predictions over the whole vocabulary.

The logits of all tokens would be by far the largest tensor (2,048 tokens with a vocabulary of
128,256 are 1 GiB in float32), so both models' logits, and the gradient of the head's input, are
computed for a few tokens at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sleb_serve.data.training import Passage
from sleb_serve.healing.config import Judgement
from sleb_serve.healing.twin import Twin
from sleb_serve.utils.heap import trim_heap

_PARTS = 24
"""Number of parts in which a batch's tokens go through the head, so that only a few logits are held
at once; all logits would need more memory than everything else.
"""
_FEWEST = 64
"""Minimum tokens per part, so that the head is not read too often."""


def tensors(passages: Sequence[Passage], device: Any) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] and the mask of predicted tokens [B, T], never the first."""
    ids = torch.tensor([list(passage.tokens) for passage in passages], device=device)
    counts = torch.tensor([list(passage.counts) for passage in passages], device=device).bool()
    counts[:, 0] = False
    return ids, counts


def predicted(passages: Sequence[Passage]) -> int:
    """Return the number of predicted tokens."""
    return sum(sum(passage.counts[1:]) for passage in passages)


def learn(twin: Twin, passages: Sequence[Passage], total: int) -> Tensor:
    """Accumulate the gradients of some passages' loss in the student's factors.

    Args:
        twin: teacher and student.
        passages: the text.
        total: number of tokens that the loss averages over; more than these for a part of a step.

    Returns:
        The passages' part of the loss, KL(teacher || student) in nats per token.
    """
    ids, counts = tensors(passages, twin.device)
    goal = _goal(twin, ids, counts)
    with twin.student():
        with twin.autocast():
            given = _chosen(twin.hidden(ids), counts)
        trim_heap(given.device)
        gradient, loss = torch.empty_like(given), torch.zeros((), device=given.device)
        size = max(_FEWEST, len(given) // _PARTS)
        for start in range(0, len(given), size):
            part = slice(start, start + size)
            piece = given[part].detach().requires_grad_()
            loss += _learn_logits(twin, piece, goal[part], total)
            gradient[part] = piece.grad
        trim_heap(given.device)
        given.backward(gradient)
    return loss


def _learn_logits(twin: Twin, given: Tensor, goal: Tensor, total: int) -> Tensor:
    """Set the gradient of a few tokens' head inputs [N, h], and return their part of the loss.

    Autograd would hold twice as many tensors of the logits' size [N, V].
    """
    with torch.no_grad(), twin.autocast():
        wanted = twin.logits(goal).log_softmax(-1)
    with twin.autocast():
        logits = twin.logits(given)
    with torch.no_grad():
        found, share = logits.log_softmax(-1), wanted.exp()
        nats = wanted.sub_(found).mul_(share).sum() / total
        # The derivative by the logits is the difference between the two distributions.
        gradient = found.exp_().sub_(share).div_(total)
    logits.backward(gradient)
    return nats


def _chosen(hidden: Tensor, counts: Tensor) -> Tensor:
    """Select the positions of [B, T, h] before predicted tokens: [N, h]."""
    # The model may be spread over devices, so its output may be on another one than the tokens.
    return hidden[:, :-1][counts[:, 1:].to(hidden.device)]


def goal_of(twin: Twin, passages: Sequence[Passage]) -> Tensor:
    """Return the head's inputs [N, h] from which the teacher predicts the passages' tokens."""
    return _goal(twin, *tensors(passages, twin.device))


def _goal(twin: Twin, ids: Tensor, counts: Tensor) -> Tensor:
    with twin.teacher(), twin.autocast():
        return _chosen(twin.hidden(ids), counts)


@torch.no_grad()
def judge(twin: Twin, passages: Sequence[Passage], goal: Tensor) -> Tensor:
    """Sum over predicted tokens: [KL, student's nats, teacher's nats, agreements, tokens].

    Args:
        twin: teacher and student.
        passages: the text.
        goal: their `goal_of`, which training does not change.
    """
    ids, counts = tensors(passages, twin.device)
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
    """Compute means from the sums over all held-out passages."""
    kl, loss, dense_loss, agreements, tokens = sums
    return Judgement(kl / tokens, loss / tokens, dense_loss / tokens, agreements / tokens)
