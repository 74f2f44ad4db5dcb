"""Simulates vLLM's continuous batching on one engine, step by step.

Each step first serves running requests, then admits waiting ones, first come, first served: one
token for each generating request, and prompts within the remaining token budget (chunked prefill).
A request is admitted if its whole prompt fits in the KV cache. If the cache is full, the most
recently admitted request is evicted and restarts from its tokens (preemption by recomputation). All
generating requests advance together, so the simulation's cost per step does not depend on their
number.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sleb_serve.errors import SlebError

Step = Callable[[int, int, float, float], float]
"""Seconds of a step, from new tokens, sequences, tokens attended to and tokens read."""


@dataclass(frozen=True)
class Request:
    """A request's arrival in seconds, and its prompt and answer in tokens."""

    arrival: float
    prompt: int
    output: int


@dataclass(frozen=True)
class Limits:
    """Limits of a step and the cache.

    Attributes:
        tokens: new tokens per step, vLLM's ``max_num_batched_tokens``.
        sequences: concurrent requests, vLLM's ``max_num_seqs``.
        memory: size of the cache, in any unit.
        per_sequence: cache per request, independent of its length.
        per_token: cache per token.
    """

    tokens: int
    sequences: int
    memory: float
    per_sequence: float
    per_token: float

    def size(self, tokens: int) -> float:
        """Return the cache needed by a request of this length."""
        return self.per_sequence + self.per_token * tokens


@dataclass(frozen=True)
class Run:
    """Results of the requests, in order.

    ``first`` and ``last`` are the times of each request's first and last token, in seconds;
    ``steps`` counts the engine's steps, ``preemptions`` the restarted requests.
    """

    first: Sequence[float]
    last: Sequence[float]
    steps: int
    preemptions: int


def simulate(requests: Sequence[Request], limits: Limits, step: Step) -> Run:
    """Run requests, in order of arrival, through one engine.

    Raises:
        SlebError: limits are invalid, or a single request does not fit in the cache.
    """
    if not 1 <= limits.sequences <= limits.tokens:
        raise SlebError(
            f"max_num_seqs={limits.sequences}: must be at least 1 and at most the tokens of a "
            f"step, {limits.tokens}"
        )
    for request in requests:
        if limits.size(request.prompt + request.output) > limits.memory:
            raise SlebError(
                f"a request of {request.prompt} + {request.output} tokens does not fit into the "
                f"KV cache; use more or larger GPUs, or shorter requests"
            )
    engine = _Engine(requests, limits, step)
    engine.run()
    return Run(engine.first, engine.last, engine.steps, engine.preemptions)


class _Engine:
    """The scheduler's state. Requests are identified by their list index."""

    def __init__(self, requests: Sequence[Request], limits: Limits, step: Step) -> None:
        self.requests, self.limits, self.step = requests, limits, step
        self.first = [0.0] * len(requests)
        self.last = [0.0] * len(requests)
        self.steps = self.preemptions = 0
        self.waiting: deque[int] = deque()
        self.running: list[int] = []  # in order of admission, including finished requests
        self.alive = [False] * len(requests)
        self.generated = [0] * len(requests)
        self.ends = [0] * len(requests)  # step of the last token; 0 before the first
        self.ending: dict[int, list[int]] = {}
        self.sequences = 0  # running requests
        self.held = 0  # their tokens in the cache
        self.decoding = 0  # generating sequences
        self.context = 0  # their tokens in the cache
        self.partial: int | None = None  # the request with a partial prompt
        self.done = 0  # processed tokens of its prompt

    def run(self) -> None:
        """Run until the last request has its last token."""
        requests, limits, step = self.requests, self.limits, self.step
        waiting, ending = self.waiting, self.ending
        now, come, left, total = 0.0, 0, len(requests), len(requests)
        while left:
            while come < total and requests[come].arrival <= now:
                waiting.append(come)
                come += 1
            if not self.sequences and not waiting:
                now = requests[come].arrival
                continue
            preempted = self._make_room()
            new = self.decoding
            attended: float = self.context + new
            cached = attended
            self.context += new
            self.held += new
            filled: list[int] = []
            if self.partial is not None or (
                waiting and not preempted and self.sequences < limits.sequences
            ):
                new, attended, cached = self._prefill(preempted, new, attended, cached, filled)
            now += step(new, self.sequences, attended, cached)
            self.steps += 1
            for number in filled:
                if not self.generated[number]:
                    self.first[number] = now
                self._start(number)
            for number in ending.pop(self.steps, ()):
                if self.alive[number] and self.ends[number] == self.steps:
                    self.last[number] = now
                    self._end(number)
                    left -= 1

    def _make_room(self) -> bool:
        """Make room for a token of each generating request; return whether one was preempted."""
        limits, before = self.limits, self.preemptions
        while (
            self.decoding
            and limits.per_sequence * self.sequences
            + limits.per_token * (self.held + self.decoding)
            > limits.memory
        ):
            self._preempt()
        return self.preemptions > before

    def _preempt(self) -> None:
        while not self.alive[self.running[-1]]:
            self.running.pop()
        number = self.running.pop()
        if number == self.partial:
            self.partial = None
            self.held -= self.done
        else:
            self.generated[number] = self.requests[number].output - (self.ends[number] - self.steps)
            size = self.requests[number].prompt + self.generated[number] - 1
            self.ends[number] = 0
            self.decoding -= 1
            self.context -= size
            self.held -= size
        self.alive[number] = False
        self.sequences -= 1
        self.preemptions += 1
        self.waiting.appendleft(number)

    def _prefill(
        self, preempted: bool, new: int, attended: float, cached: float, filled: list[int]
    ) -> tuple[int, float, float]:
        """Run prompts within the budget and the cache, and add complete ones to ``filled``.

        Returns the step's new tokens, those attended to, and those read.
        """
        limits = self.limits
        while new < limits.tokens:
            if self.partial is None and (preempted or not self._admit()):
                break
            number = self.partial
            assert number is not None
            begin = self.done
            size = min(self._to_fill(number) - begin, limits.tokens - new)
            used = limits.per_sequence * self.sequences + limits.per_token * (self.held + size)
            if used > limits.memory:
                self._preempt()
                break
            end = self.done = begin + size
            self.held += size
            new += size
            attended += (end * (end + 1) - begin * (begin + 1)) / 2
            cached += end
            if end == self._to_fill(number):
                filled.append(number)
                self.partial = None
        return new, attended, cached

    def _admit(self) -> bool:
        limits = self.limits
        if not self.waiting or self.sequences >= limits.sequences:
            return False
        number = self.waiting[0]
        used = limits.per_sequence * self.sequences + limits.per_token * self.held
        if used + limits.size(self._to_fill(number)) > limits.memory:
            return False
        self.partial = self.waiting.popleft()
        self.done = 0
        self.alive[number] = True
        self.running.append(number)
        self.sequences += 1
        return True

    def _to_fill(self, number: int) -> int:
        """Return the number of known tokens of a request."""
        return self.requests[number].prompt + self.generated[number]

    def _start(self, number: int) -> None:
        """Finish a prompt, which yields a token."""
        size = self._to_fill(number)
        self.generated[number] += 1
        end = self.steps + self.requests[number].output - self.generated[number]
        self.ends[number] = end
        self.ending.setdefault(end, []).append(number)
        self.decoding += 1
        self.context += size

    def _end(self, number: int) -> None:
        self.alive[number] = False
        request = self.requests[number]
        size = request.prompt + request.output - 1
        self.sequences -= 1
        self.decoding -= 1
        self.context -= size
        self.held -= size
