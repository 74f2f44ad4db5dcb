"""One vLLM engine in a process of its own, told over a pipe what to measure."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sleb_serve.errors import SlebError

Prompts = Sequence[Sequence[int]]

_REASON_LENGTH = 400


@dataclass(frozen=True)
class Sample:
    """One measurement. Times in seconds; field names as in the JSON of ``vllm bench``.

    For ``prefill`` the elapsed time is the wall time of the whole call. For ``decode`` it runs from
    the moment when every sequence has its first token to the last token, so it holds no prefill.
    """

    elapsed_time: float
    num_requests: int
    total_input_tokens: int
    total_output_tokens: int


@dataclass(frozen=True)
class _Failure:
    """Sent by the child instead of a result."""

    reason: str


class Engine:
    """A vLLM engine in a child process.

    Args:
        name: what to call it in messages.
        arguments: keyword arguments of ``vllm.LLM``.
        log: where the child's output goes.
    """

    def __init__(self, name: str, arguments: dict[str, Any], log: Path) -> None:
        self.name = name
        self._log = log
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, arguments, str(log)))
        self._process.start()
        theirs.close()

    def ready(self) -> dict[str, Any]:
        """Wait for the engine's start; what it says of itself: KV cache tokens, versions.

        Raises:
            SlebError: it ended instead.
        """
        result: dict[str, Any] = self._receive()
        return result

    def prefill(self, prompts: Prompts) -> Sample:
        """Process prompts, one new token each."""
        self._pipe.send(("prefill", prompts))
        sample: Sample = self._receive()
        return sample

    def decode(self, prompts: Prompts, output_length: int) -> Sample:
        """Generate exactly `output_length` tokens for each prompt, all at once."""
        self._pipe.send(("decode", prompts, output_length))
        sample: Sample = self._receive()
        return sample

    def loss(self, windows: Prompts) -> float:
        """Mean nats per predicted token of windows of token ids."""
        self._pipe.send(("loss", windows))
        result: float = self._receive()
        return result

    def close(self) -> None:
        """End the engine; harmless if it has ended."""
        self._pipe.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self) -> Any:
        try:
            result = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(10)
            raise SlebError(
                f"the {self.name} engine ended without a word; its output is in {self._log}"
            ) from None
        if isinstance(result, _Failure):
            why = " ".join(result.reason.split())
            raise SlebError(
                f"the {self.name} engine failed: {why[:_REASON_LENGTH]}; its output is in "
                f"{self._log}"
            )
        return result


def _serve(pipe: Connection, arguments: dict[str, Any], log: str) -> None:
    """The child: start the engine, answer requests until the pipe closes."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # One process less to schedule while the other variant is measured; several ranks still get
    # processes of their own.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import torch
    import vllm

    try:
        llm = vllm.LLM(**arguments)
    except Exception as error:
        pipe.send(_Failure(str(error) or type(error).__name__))
        raise
    cache = llm.llm_engine.vllm_config.cache_config
    pipe.send(
        {
            "kv_cache_tokens": cache.num_gpu_blocks * cache.block_size,
            "vllm": vllm.__version__,
            "torch": torch.__version__,
        }
    )
    actions: dict[str, Callable[..., Any]] = {"prefill": _prefill, "decode": _decode, "loss": _loss}
    while True:
        try:
            action, *values = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(actions[action](llm, *values))
        except ValueError as error:
            pipe.send(_Failure(str(error)))


def _generate(llm: Any, prompts: Prompts, **sampling: Any) -> Any:
    from vllm import SamplingParams

    return llm.generate(
        [{"prompt_token_ids": list(prompt)} for prompt in prompts],
        SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, **sampling),
        use_tqdm=False,
    )


def _sample(outputs: Any, elapsed: float, prompts: Prompts, output_length: int) -> Sample:
    inputs = sum(len(output.prompt_token_ids) for output in outputs)
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)
    if (inputs, generated) != (sum(map(len, prompts)), output_length * len(prompts)):
        raise ValueError(f"{inputs} tokens in and {generated} out are not what was asked for")
    if any(output.num_cached_tokens for output in outputs):
        raise ValueError("a prompt was answered from the prefix cache")
    return Sample(elapsed, len(outputs), inputs, generated)


def _prefill(llm: Any, prompts: Prompts) -> Sample:
    start = time.perf_counter()
    outputs = _generate(llm, prompts, max_tokens=1)
    return _sample(outputs, time.perf_counter() - start, prompts, 1)


def _decode(llm: Any, prompts: Prompts, output_length: int) -> Sample:
    outputs = _generate(llm, prompts, max_tokens=output_length)
    begin = max(output.metrics.first_token_ts for output in outputs)
    end = max(output.metrics.last_token_ts for output in outputs)
    if begin != min(output.metrics.first_token_ts for output in outputs):
        raise ValueError("the prompts were not all processed in one step; use a smaller batch")
    return _sample(outputs, end - begin, prompts, output_length)


def _loss(llm: Any, windows: Prompts) -> float:
    outputs = _generate(llm, windows, max_tokens=1, prompt_logprobs=0)
    nats: list[float] = [
        -logprobs[token].logprob
        for output in outputs
        for token, logprobs in zip(
            output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
        )
    ]
    return sum(nats) / len(nats)
