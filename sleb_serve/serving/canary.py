"""Compares a dense and a pruned server on the same requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from statistics import fmean, median
from typing import Any

from sleb_serve.data.texts import embedded_text
from sleb_serve.errors import SlebError, first_line
from sleb_serve.serving.client import Client, Completion
from sleb_serve.utils import strict_json
from sleb_serve.utils.limited import read_limited

_PROMPT_CHARACTERS = 400
_MAX_PROMPTS = 64 << 20
CONCURRENCY = 4


@dataclass(frozen=True)
class Drift:
    """Differences between a pruned and a dense server.

    Attributes:
        requests: number of prompts answered by both.
        dense_loss: mean nats per prompt token of the dense model.
        pruned_loss: the same for the pruned model.
        logprob_drift: mean absolute difference of a prompt token's log-probability.
        same_share: share of the dense answer's characters in the common prefix.
        dense_tokens: median length of the dense answers, in tokens.
        pruned_tokens: the same for the pruned answers.
    """

    requests: int
    dense_loss: float
    pruned_loss: float
    logprob_drift: float
    same_share: float
    dense_tokens: float
    pruned_tokens: float

    @property
    def loss_drift(self) -> float:
        """Return the loss increase on these prompts in nats per token."""
        return self.pruned_loss - self.dense_loss

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**asdict(self), "loss_drift": self.loss_drift}

    def to_text(self) -> str:
        """Return a readable summary."""
        return "\n".join(
            (
                f"requests             {self.requests}",
                f"loss, nats a token   dense {self.dense_loss:.4f}, pruned {self.pruned_loss:.4f}, "
                f"drift {self.loss_drift:+.4f}",
                f"log-probabilities    {self.logprob_drift:.4f} nats apart on average",
                f"answers              {100 * self.same_share:.0f} % the same from the start; "
                f"median {self.dense_tokens:g} tokens dense, {self.pruned_tokens:g} pruned",
            )
        )


def read_prompts(path: Path | None, count: int) -> list[str]:
    """Read prompts from a file (text, or JSON lines with ``prompt`` or ``text``), or built-in ones.

    Raises:
        SlebError: the file cannot be read, or has none.
    """
    if path is None:
        text = embedded_text()
        step = max(_PROMPT_CHARACTERS, len(text) // count)
        starts = range(0, min(count * step, len(text)), step)
        return [text[start : start + _PROMPT_CHARACTERS] for start in starts]
    try:
        # Not splitlines, because a JSON string may contain other line breaks.
        lines = read_limited(path, _MAX_PROMPTS).decode("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise SlebError(f"cannot read prompts {path}: {first_line(error)}; give UTF-8") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".jsonl":
        prompts = [_prompt(line, f"{path}, line {number}") for number, line in numbered[:count]]
    else:
        prompts = [line for _, line in numbered[:count]]
    if not prompts:
        raise SlebError(f"{path}: no prompts in it; give a line each, or JSON lines with prompt")
    return prompts


def _prompt(line: str, where: str) -> str:
    try:
        entry = strict_json.any_object(strict_json.load(line.encode()), "it")
    except SlebError as error:
        raise SlebError(f"{where}: {strict_json.without_advice(error)}") from error
    prompt = entry.get("prompt", entry.get("text"))
    if not isinstance(prompt, str) or not prompt:
        raise SlebError(f"{where} has no text in prompt; give an object with prompt or text")
    return prompt


def canary(
    dense: Client,
    pruned: Client,
    prompts: Sequence[str],
    max_tokens: int,
    concurrency: int = CONCURRENCY,
    on_answer: Callable[[], None] = lambda: None,
) -> Drift:
    """Send every prompt to both servers, and compare the answers.

    Raises:
        ServerError: a server does not answer.
        SlebError: their tokens differ.
    """
    names = [server.model() for server in (dense, pruned)]

    def ask(prompt: str) -> tuple[Completion, Completion]:
        one, two = (
            server.complete(name, prompt, max_tokens, score=True)
            for server, name in zip((dense, pruned), names, strict=True)
        )
        on_answer()
        return one, two

    with ThreadPoolExecutor(concurrency) as pool:
        try:
            pairs = list(pool.map(ask, prompts))
        finally:
            # After an error or Ctrl-C, do not send waiting prompts.
            pool.shutdown(wait=False, cancel_futures=True)
    if any(len(one.prompt_logprobs) != len(two.prompt_logprobs) for one, two in pairs):
        raise SlebError("the servers tokenize the prompts differently: not the same model")
    scores = [
        (a, b)
        for one, two in pairs
        for a, b in zip(one.prompt_logprobs, two.prompt_logprobs, strict=True)
    ]
    if not scores:
        raise SlebError("the prompts have no tokens to compare; give longer ones")
    return Drift(
        len(pairs),
        -fmean(a for a, _ in scores),
        -fmean(b for _, b in scores),
        fmean(abs(a - b) for a, b in scores),
        fmean(_same(one.text, two.text) for one, two in pairs),
        median(one.tokens for one, _ in pairs),
        median(two.tokens for _, two in pairs),
    )


def _same(one: str, two: str) -> float:
    """Return the share of `one` in the common prefix with `two`."""
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))
    return shared / len(one) if one else float(not two)
