"""A plain implementation of the scheduler that `sleb-serve plan --rate` simulates."""

from __future__ import annotations

from collections.abc import Sequence

from sleb_serve.roofline.simulation import Limits, Request, Run, Step


def linear(new: int, sequences: int, attended: float, cached: float) -> float:
    return 0.01 + 1e-5 * new + 2e-6 * sequences + 1e-8 * attended + 1e-7 * cached


def plainly(requests: Sequence[Request], limits: Limits, step: Step) -> Run:
    """The same scheduler with a loop over every request in every step, and nothing kept."""
    known = [request.prompt for request in requests]  # tokens there are of each
    computed = [0] * len(requests)  # of them, in the cache
    first, last = [0.0] * len(requests), [0.0] * len(requests)
    waiting: list[int] = []
    running: list[int] = []
    now, come, steps, preemptions = 0.0, 0, 0, 0

    def used() -> float:
        return sum(limits.size(computed[i]) for i in running)

    while not all(last):
        while come < len(requests) and requests[come].arrival <= now:
            waiting.append(come)
            come += 1
        if not running and not waiting:
            now = requests[come].arrival
            continue
        budget, preempted = limits.tokens, False
        work: list[tuple[int, int]] = []
        for number in list(running):
            if number not in running:
                continue  # it had to go
            size = min(known[number] - computed[number], budget)
            while number in running and used() + limits.per_token * size > limits.memory:
                gone = running.pop()
                waiting.insert(0, gone)
                budget += sum(count for done, count in work if done == gone)
                work = [one for one in work if one[0] != gone]
                computed[gone] = 0
                preempted = True
                preemptions += 1
            if number in running:
                work.append((number, size))
                computed[number] += size
                budget -= size
        while not preempted and waiting and len(running) < limits.sequences and budget:
            number = waiting[0]
            if used() + limits.size(known[number]) > limits.memory:
                break
            running.append(waiting.pop(0))
            size = min(known[number], budget)
            work.append((number, size))
            computed[number] += size
            budget -= size
        new = sum(size for _, size in work)
        attended = sum(
            sum(range(computed[number] - size + 1, computed[number] + 1)) for number, size in work
        )
        now += step(new, len(running), attended, sum(computed[number] for number, _ in work))
        steps += 1
        for number, _ in work:
            if computed[number] == known[number]:
                first[number] = first[number] or now
                known[number] += 1
                if known[number] == requests[number].prompt + requests[number].output:
                    last[number] = now
                    running.remove(number)
    return Run(first, last, steps, preemptions)
