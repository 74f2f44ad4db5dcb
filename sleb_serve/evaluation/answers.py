"""Whether a pruned model answers as the dense one does, both greedily.

The pruned model need not generate: it gives the dense model's answer up to the first place where,
after the question and what came before, it finds another token the likeliest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

ANSWER_LENGTH = 32
"""Tokens of an answer that are compared, at most."""


@dataclass(frozen=True)
class Answer:
    """Token ids of a question and of an answer to it, which ends early where the model ends it."""

    question: tuple[int, ...]
    tokens: tuple[int, ...]


@torch.inference_mode()
def answered(model: Any, questions: Sequence[Sequence[int]]) -> list[Answer]:
    """A Transformers model's greedy answers, of `ANSWER_LENGTH` tokens at most."""
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
    # Questions of one length are asked at once: padding would change a little in the answers.
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
    """With how many of an answer's tokens a model would begin its own greedy answer."""
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([[*answer.question, *answer.tokens]], device=device)
    logits = model(ids, use_cache=False).logits[0, len(answer.question) - 1 : -1]
    same = logits.argmax(-1).cpu() == torch.tensor(answer.tokens)
    return int(same.cumprod(0).sum())


def shares(model: Any, answers: Sequence[Answer]) -> dict[str, float]:
    """How far a model gives the same answers.

    Returns:
        ``whole``, the share of answers that are the same to their end; ``tokens``, the mean share
        of an answer's tokens before the first that differs.
    """
    pairs = [(same_tokens(model, answer), len(answer.tokens)) for answer in answers]
    return {
        "whole": sum(same == length for same, length in pairs) / len(pairs),
        "tokens": sum(same / length for same, length in pairs) / len(pairs),
    }
