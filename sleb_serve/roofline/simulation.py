"""One engine under load: continuous batching as vLLM schedules it, step by step.

Each step serves first the requests that run, then admits those that wait, first come, first
served: a token for each request that generates, and of prompts as much as the budget of tokens
leaves (chunked prefill). A request is admitted if its whole prompt fits into the KV cache. Where
the cache runs full, the request that was admitted last gives up what it has and starts again from
its tokens (preemption by recomputation). All requests that generate advance together, so a step
costs the simulation the same whatever their number.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sleb_serve.errors import SlebError

Step = Callable[[int, int, float, float], float]
"""Seconds of a step, from the new tokens, the sequences, the tokens attended to and those read."""


@dataclass(frozen=True)
class Request:
    """When it comes, in seconds; its prompt and its answer, in tokens."""

    arrival: float
    prompt: int
    output: int


@dataclass(frozen=True)
class Limits:
    """What bounds a step and the cache.

    Attributes:
        tokens: new tokens in a step, vLLM's ``max_num_batched_tokens``.
        sequences: requests that run at once, vLLM's ``max_num_seqs``.
        memory: size of the cache, in any unit.
        per_sequence: of it, what a request takes whatever its length.
        per_token: of it, what a request takes a token.
    """

    tokens: int
    sequences: int
    memory: float
    per_sequence: float
    per_token: float

    def size(self, tokens: int) -> float:
        """What a request of so many tokens takes."""
        return self.per_sequence + self.per_token * tokens


@dataclass(frozen=True)
class Run:
    """What came of the requests, in their order.

    ``first`` and ``last`` are the times of each one's first and last token, in seconds; ``steps``
    counts the engine's steps, ``preemptions`` the requests that had to start again.
    """

    first: Sequence[float]
    last: Sequence[float]
    steps: int
    preemptions: int


def simulate(requests: Sequence[Request], limits: Limits, step: Step) -> Run:
    """Put requests, in the order in which they come, through one engine.

    Raises:
        SlebError: limits that cannot be, or a request that does not fit into the cache alone.
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
    """The scheduler's state. Requests go by their place in the list."""

    def __init__(self, requests: Sequence[Request], limits: Limits, step: Step) -> None:
        self.requests, self.limits, self.step = requests, limits, step
        self.first = [0.0] * len(requests)
        self.last = [0.0] * len(requests)
        self.steps = self.preemptions = 0
        self.waiting: deque[int] = deque()
        self.running: list[int] = []  # in the order of admission; those that ended stay in it
        self.alive = [False] * len(requests)
        self.generated = [0] * len(requests)
        self.ends = [0] * len(requests)  # the step that yields the last token; 0 before the first
        self.ending: dict[int, list[int]] = {}
        self.sequences = 0  # that run
        self.held = 0  # tokens of theirs in the cache
        self.decoding = 0  # of the sequences, those that generate
        self.context = 0  # tokens of these in the cache
        self.partial: int | None = None  # the one whose prompt is in the midst
        self.done = 0  # tokens of its prompt

    def run(self) -> None:
        """Until the last request has its last token."""
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
        """Room for a token of each that generates; whether one had to go for it."""
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
        """Prompts, as many as the budget and the cache leave; those that are through go to
        ``filled``. Returns the step's new tokens, those attended to, and those read.
        """  # noqa: D205
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
        """Tokens that are known before it generates more."""
        return self.requests[number].prompt + self.generated[number]

    def _start(self, number: int) -> None:
        """Its prompt is through, and has given a token."""
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
