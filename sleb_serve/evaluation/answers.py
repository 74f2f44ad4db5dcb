"""Compares the greedy answers of a pruned model with the dense one's.

The pruned model need not generate: given the question and the dense answer so far, it reproduces
the answer up to the first position with a different most likely token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

ANSWER_LENGTH = 32
"""Maximum number of compared tokens per answer."""


@dataclass(frozen=True)
class Answer:
    """Token ids of a question and its answer, which may end early."""

    question: tuple[int, ...]
    tokens: tuple[int, ...]


@torch.inference_mode()
def answered(model: Any, questions: Sequence[Sequence[int]]) -> list[Answer]:
    """Return a Transformers model's greedy answers of at most `ANSWER_LENGTH` tokens."""
    from transformers import GenerationConfig

    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=ANSWER_LENGTH,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
    )
    found = []
    # Batch only questions of equal length, because padding would slightly change the answers.
    for _, group in groupby(sorted(questions, key=len), key=len):
        asked = torch.tensor([list(question) for question in group])
        ids = asked.to(model.get_input_embeddings().weight.device)
        whole = model.generate(ids, generation_config=greedy, attention_mask=torch.ones_like(ids))
        for question, sequence in zip(asked.tolist(), whole.tolist(), strict=True):
            tokens = sequence[len(question) :]
            length = next((i for i, token in enumerate(tokens, 1) if token in ends), len(tokens))
            found.append(Answer(tuple(question), tuple(tokens[:length])))
    return found


@torch.inference_mode()
def same_tokens(model: Any, answer: Answer) -> int:
    """Return how many first tokens of an answer a model would also generate greedily."""
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([[*answer.question, *answer.tokens]], device=device)
    logits = model(ids, use_cache=False).logits[0, len(answer.question) - 1 : -1]
    same = logits.argmax(-1).cpu() == torch.tensor(answer.tokens)
    return int(same.cumprod(0).sum())


def shares(model: Any, answers: Sequence[Answer]) -> dict[str, float]:
    """Measure how much of the answers a model reproduces.

    Returns:
        ``whole``, the share of identical answers; ``tokens``, the mean share of an answer's tokens
        before the first difference.
    """
    pairs = [(same_tokens(model, answer), len(answer.tokens)) for answer in answers]
    return {
        "whole": sum(same == length for same, length in pairs) / len(pairs),
        "tokens": sum(same / length for same, length in pairs) / len(pairs),
    }
