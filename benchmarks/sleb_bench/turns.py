"""Measures engines in turns: starts, warm-up and pairs, until the intervals are narrow enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sleb_bench.engine import Engine, EngineSpec, Host, has_gpu
from sleb_bench.pace import FEWEST, Pace, Ratios, calls_a_turn, is_due, warms_up
from sleb_bench.pairs import are_apart, compared, pairs_of, speed_ratio
from sleb_bench.records import Records
from sleb_bench.variants import DENSE, Variant, processes
from sleb_serve.roofline.workload import Prompts, Workload
from sleb_serve.utils.atomic_io import write_atomically
from sleb_serve.utils.signals import signals_held

Say = Callable[[str], None]
Draw = Callable[[Workload, str], Prompts]
_NEWS = 15.0
"""Seconds between two progress messages, which also save the records."""
_WARM_UP_SHARE, _WARM_UP_LEAST = 0.1, 20.0
"""After this share of the time limit, and so many seconds, the warm-up of a workload ends: of long
turns, one is enough."""
_ROUNDS_ALONE = 8
"""Rounds in a start of an engine that runs alone; only more starts narrow its interval."""


@dataclass(frozen=True)
class Plan:
    """Plan of the turns.

    Attributes:
        todo: the workloads.
        draw: returns the prompts of one call of a workload for a seed.
        sequences: held-out text for the perplexity; may be empty.
        output: folder for logs and profiles.
        precision: target half-width of intervals, such as 0.02.
        minutes: time limit, from when the first engines are ready.
        starts: minimum starts of every engine.
        one_at_a_time: whether to run one engine at a time.
        profile: whether to profile each workload once.
    """

    todo: Sequence[Workload]
    draw: Draw
    sequences: Prompts
    output: Path
    precision: float
    minutes: float
    starts: int
    one_at_a_time: bool
    profile: bool


def measure_by_turns(
    plan: Plan, variants: Sequence[Variant], records: Records, say: Say
) -> dict[str, Any]:
    """Start engines and measure them until the intervals are narrow or the time is up.

    Args:
        plan: the plan.
        variants: the variants to measure.
        records: receives every engine, sample and quality; saved regularly.
        say: receives progress messages.

    Returns:
        Why it ended, and the minutes it took.

    Raises:
        SlebError: an engine failed.
    """
    return _Turns(plan, variants, records, say).run()


class _Turns:
    def __init__(self, plan: Plan, variants: Sequence[Variant], records: Records, say: Say) -> None:
        self.plan, self.variants, self.records, self.say = plan, variants, records, say
        self._gpu = has_gpu()
        self._processes = processes(variants, gpu=self._gpu)
        apart = plan.one_at_a_time or len(set(self._processes.values())) > 1
        self.pace = Pace(plan.precision, plan.minutes, plan.starts, apart)
        self._over = {variant.name: variant.over for variant in variants}
        self._dense_blocks: int | None = None

    def run(self) -> dict[str, Any]:
        """Run all starts."""
        plan, pace, start = self.plan, self.pace, 0
        groups = [[v] for v in self.variants] if plan.one_at_a_time else [list(self.variants)]
        while True:
            start += 1
            self.say(f"start {start}; engines log to {plan.output}")
            starting = 0.0
            for group in groups:
                begin = pace.clock()
                with self._engines(start, group) as engines:
                    starting += pace.clock() - begin
                    pace.ready()
                    self._measure(start, group, engines)
                    if start == 1:
                        self._once(group, engines)
            self.records.save()
            why = pace.verdict(self._ratios(), start, starting)
            if why is not None:
                self.say(f"{why} after {start} starts and {pace.spent():.1f} minutes")
                return {"why": why, "minutes": round(pace.spent(), 2), "starts": start}

    @contextmanager
    def _engines(self, start: int, group: Sequence[Variant]) -> Iterator[dict[str, Engine]]:
        """Start the engines of a group in a varying order."""
        with ExitStack() as stack:
            hosts: dict[str, Host] = {}
            engines: dict[str, Engine] = {}
            turn = (start - 1) % len(group)
            order = [*group[turn:], *group[:turn]]
            # Only the dense engine knows the cap.
            for variant in sorted(order, key=lambda v: v.capped):
                name = variant.name
                process = name if self.plan.one_at_a_time else self._processes[name]
                if process not in hosts:
                    environment = variant.spec.environment
                    with signals_held():
                        hosts[process] = Host(environment, self.plan.output / f"{process}.log")
                        stack.callback(hosts[process].close)
                about = hosts[process].start(name, self._spec(variant))
                if name == DENSE:
                    self._dense_blocks = about["kv_cache_blocks"]
                place = {"start": start, "variant": name, "process": process}
                self.records.add("engine", {**place, **about})
                self.say(_ready(name, about))
                engines[name] = Engine(hosts[process], name)
            yield engines

    def _spec(self, variant: Variant) -> EngineSpec:
        if not variant.capped:
            return variant.spec
        arguments = {**variant.spec.arguments, "num_gpu_blocks_override": self._dense_blocks}
        return replace(variant.spec, arguments=arguments)

    def _measure(self, start: int, group: Sequence[Variant], engines: Mapping[str, Engine]) -> None:
        """Warm up, then measure rounds until this start is over."""
        calls = {w.name: self._warm_up(start, w, group, engines) for w in self.plan.todo}
        left, done = {workload.name for workload in self.plan.todo}, 0
        ratios: Ratios = {}
        judged, told = 0, self.pace.clock()
        while left:
            done += 1
            for workload in self.plan.todo:
                if workload.name in left:
                    number = calls[workload.name]
                    self._round(start, done, workload, number, _order(group, done), engines)
            if self.plan.one_at_a_time:
                left = left if done < _ROUNDS_ALONE else set()
                continue
            if is_due(done, judged):
                ratios, judged = self._ratios(), done
            if self.pace.clock() - told >= _NEWS:
                self.say(_so_far(ratios, judged))
                self.records.save()
                told = self.pace.clock()
            left &= set(self.pace.unfinished(ratios, start, done))

    def _warm_up(
        self,
        start: int,
        workload: Workload,
        group: Sequence[Variant],
        engines: Mapping[str, Engine],
    ) -> int:
        """Run turns until they stop getting faster; return the calls per turn."""
        seconds: list[float] = []
        calls, number = 1, 0
        limit = max(_WARM_UP_LEAST, 60 * self.plan.minutes * _WARM_UP_SHARE)
        begin = self.pace.clock()
        # Use the sum of all engines: on a busy machine a single one is often fastest by chance.
        while not seconds or (warms_up(seconds) and self.pace.clock() - begin < limit):
            found = self._round(start, number, workload, calls, group, engines)
            seconds.append(sum(found.values()) / calls)
            calls = calls_a_turn(min(seconds) / len(found))
            number -= 1
        if 2 * min(seconds) * calls > 60 * self.plan.minutes:
            took = f"{min(seconds) * calls:.0f} s"
            self.say(f"{workload.name}: a round takes {took}; at least two are measured")
        return calls

    def _round(
        self,
        start: int,
        number: int,
        workload: Workload,
        calls: int,
        order: Sequence[Variant],
        engines: Mapping[str, Engine],
    ) -> dict[str, float]:
        """Run a turn on each engine with the same prompts; return seconds by variant."""
        seeds = [f"{start} {number} {call}" for call in range(calls)]
        prompts = [self.plan.draw(workload, seed) for seed in seeds]
        times = {}
        for variant in order:
            if not variant.can(workload.measure):
                continue
            sample = engines[variant.name].measure(workload, prompts)
            place = {"workload": workload.name, "variant": variant.name, "start": start}
            self.records.add("sample", {**place, "round": number, **asdict(sample)})
            times[variant.name] = sample.elapsed_time
        return times

    def _ratios(self) -> Ratios:
        """Return the ratios so far by workload, computed as in the report."""
        samples = [r for r in self.records.entries if r["record"] == "sample"]
        started = [r for r in self.records.entries if r["record"] == "engine"]
        found = {}
        for workload in self.plan.todo:
            pairs = [
                (pairs_of(workload, samples, name, over), are_apart(started, name, over))
                for name, over in compared(self._over)
            ]
            found[workload.name] = [speed_ratio(p, apart=apart) for p, apart in pairs if p]
        return found

    def _once(self, group: Sequence[Variant], engines: Mapping[str, Engine]) -> None:
        """Measure values that do not change between starts: quality and profile."""
        for variant in group:
            engine = engines[variant.name]
            if self.plan.sequences:
                loss = engine.loss(self.plan.sequences)
                self.records.add("quality", {"variant": variant.name, "loss": loss})
                self.say(f"{variant.name}: held-out loss {loss:.4f} nats per token")
            for workload in self.plan.todo if self.plan.profile else ():
                if variant.can(workload.measure):
                    table = engine.profile(workload, self.plan.draw(workload, "profile"))
                    name = f"profile-{variant.name}-{workload.name.replace('/', '-')}.txt"
                    write_atomically(self.plan.output / name, table.encode())


def _order(group: Sequence[Variant], number: int) -> list[Variant]:
    """Reverse the order in each round, so that drift favours no variant."""
    turn = (number - 1) // 2 % len(group)
    order = [*group[turn:], *group[:turn]]
    return order if number % 2 else order[::-1]


def _ready(name: str, about: Mapping[str, Any]) -> str:
    cache = about.get("kv_cache_tokens")
    size = "" if cache is None else f", KV cache {cache} tokens"
    return f"{name}: ready in {about['startup_time']:.0f} s{size}"


def _so_far(ratios: Ratios, done: int) -> str:
    """Format the ratios in one line; too few pairs have an interval that tells nothing."""
    if done < FEWEST:
        return f"{done} pairs"
    texts = []
    for name, found in ratios.items():
        for ratio in found:
            low, high = ratio.interval or (0.0, float("inf"))
            texts.append(f"{name} {ratio.mean:.3f}x ({low:.3f} to {high:.3f})")
    return f"{done} pairs: {', '.join(texts)}"
