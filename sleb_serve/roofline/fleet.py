"""Number of replicas for a request rate within a service level, dense and pruned.

A load balancer that picks replicas at random gives each a Poisson stream, so one replica is
simulated under its share of the load. Requests are the same at every rate, only closer together.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from sleb_serve.errors import SlebError
from sleb_serve.roofline.gpu import Gpu
from sleb_serve.roofline.model import Model
from sleb_serve.roofline.plan import free_memory
from sleb_serve.roofline.simulation import Limits, Request, Step, simulate
from sleb_serve.roofline.step import Roofline
from sleb_serve.utils.markdown import table

METRICS = ("ttft", "tpot", "e2el")
_WARM_UP = 0.1
"""Share of first requests that are not counted, because the engine is still empty."""
_BLOCK = 16
"""Tokens per block of vLLM's KV cache; a request's last block is half full on average."""
_MOST_REPLICAS = 1 << 20
_CAPACITY_ROUNDS = 8
_FAR = 1e6
"""Seconds between requests that never overlap."""
_ALONE = 200
"""Number of requests that are simulated alone."""


@dataclass(frozen=True)
class Load:
    """The load.

    Attributes:
        rate: requests/s over all replicas.
        input_length: average tokens per prompt, and ``output_length``, per answer.
        spread: lengths are uniform within this fraction of their average, 0 for equal ones.
        requests: number of simulated requests on one replica.
        seed: seed for their lengths and arrivals.
    """

    rate: float
    input_length: int = 512
    output_length: int = 128
    spread: float = 0.0
    requests: int = 4000
    seed: int = 0

    def check(self) -> None:
        """Refuse invalid numbers.

        Raises:
            SlebError: names the option.
        """
        if not (self.rate > 0 and math.isfinite(self.rate)):
            raise SlebError(f"rate={self.rate:g}: give requests per second above 0")
        if self.input_length < 1 or self.output_length < 2:
            raise SlebError("input_length=N is at least 1, output_length=N at least 2")
        if not 0 <= self.spread < 1:
            raise SlebError(f"range_ratio={self.spread:g}: give at least 0 and less than 1")

    def stream(self, rate: float) -> list[Request]:
        """Return Poisson arrivals at a rate; rates change only the times."""
        source, now, found = random.Random(self.seed), 0.0, []

        def length(mean: int, least: int) -> int:
            low, high = mean * (1 - self.spread), mean * (1 + self.spread)
            return max(least, source.randint(math.ceil(low), math.floor(high)))

        for _ in range(self.requests):
            now += source.expovariate(1.0)
            prompt, output = length(self.input_length, 1), length(self.output_length, 2)
            found.append(Request(now / rate, prompt, output))
        return found


@dataclass(frozen=True)
class Slo:
    """Limits in seconds by metric of `METRICS`, and the share of requests that must meet them."""

    limits: Mapping[str, float]
    attainment: float = 0.99


@dataclass(frozen=True)
class Replica:
    """One engine: its removed blocks, GPUs, limits and step times."""

    removed: int
    gpus: int
    limits: Limits
    step: Step


@dataclass(frozen=True)
class Served:
    """The share of requests within the service level; 99th percentiles in seconds."""

    attainment: float
    ttft: float
    tpot: float
    e2el: float


@dataclass(frozen=True)
class Need:
    """The need of a model without ``removed`` blocks; ``replicas`` is None if no number suffices.

    ``capacity`` is the maximum requests/s of one replica within the service level; ``served`` is at
    the number of replicas, or for a request alone if no number suffices, or None if the weights do
    not fit.
    """

    removed: int
    replicas: int | None
    gpus: int | None
    capacity: float
    served: Served | None


def serve(replica: Replica, load: Load, rate: float, slo: Slo) -> Served:
    """Simulate one replica under its share of the load."""
    requests = load.stream(rate)
    run = simulate(requests, replica.limits, replica.step)
    begin = int(len(requests) * _WARM_UP)
    found: dict[str, list[float]] = {metric: [] for metric in METRICS}
    within = 0
    for request, first, last in list(zip(requests, run.first, run.last, strict=True))[begin:]:
        values = {
            "ttft": first - request.arrival,
            "tpot": (last - first) / (request.output - 1),
            "e2el": last - request.arrival,
        }
        for metric, value in values.items():
            found[metric].append(value)
        within += all(values[metric] <= limit for metric, limit in slo.limits.items())
    tails = {metric: _percentile(values, 0.99) for metric, values in found.items()}
    return Served(within / (len(requests) - begin), **tails)


def _percentile(values: Sequence[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, math.ceil(part * len(values)) - 1)]


def fewest(enough: Callable[[int], bool]) -> int | None:
    """Return the smallest number for which it and all greater ones suffice; None without one."""
    low, high = 0, 1
    while not enough(high):
        low, high = high, 2 * high
        if high > _MOST_REPLICAS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def need(replica: Replica, load: Load, slo: Slo) -> Need:
    """Compute the number of replicas for the load, and the capacity of one.

    Raises:
        SlebError: a request does not fit in the KV cache, or limits are invalid.
    """

    def enough(rate: float) -> bool:
        return serve(replica, load, rate, slo).attainment >= slo.attainment

    alone = serve(replica, replace(load, requests=_ALONE), 1 / _FAR, slo)
    count = None
    if alone.attainment >= slo.attainment:
        count = fewest(lambda number: enough(load.rate / number))
    if count is None:
        return Need(replica.removed, None, None, 0.0, alone)
    low = load.rate / count
    high = load.rate / (count - 1) if count > 1 else 2 * low
    while count == 1 and enough(high) and high < _FAR:
        low, high = high, 2 * high
    for _ in range(_CAPACITY_ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    served = serve(replica, load, load.rate / count, slo)
    return Need(replica.removed, count, count * replica.gpus, low, served)


def roofline_replica(
    model: Model,
    gpu: Gpu,
    gpus: int,
    removed: int,
    load: Load,
    *,
    max_tokens: int,
    max_sequences: int,
    split: str = "tensor",
) -> Replica | None:
    """Return a replica with roofline step times; None if the weights do not fit."""
    free = free_memory(model, gpu, gpus, removed)
    if free <= 0:
        return None
    length = load.input_length + load.output_length
    state = model.cache_size(removed, 0)
    token = (model.cache_size(removed, length) - state) / length
    limits = Limits(max_tokens, max_sequences, free, state + _BLOCK / 2 * token, token)
    return Replica(removed, gpus, limits, Roofline(model, gpu, gpus, removed, split))


def describe_fleet(needs: Sequence[Need], load: Load, slo: Slo, heading: str) -> str:
    """Format the needs as a table."""
    levels = " and ".join(f"{name.upper()} {1e3 * s:g} ms" for name, s in slo.limits.items())
    lengths = f"{load.input_length} + {load.output_length} tokens"
    rows: list[tuple[str, ...]] = [
        (
            *("removed", "replicas", "GPUs", "within the SLO", "TTFT p99, ms", "TPOT p99, ms"),
            *("requests/s a replica, at most", "ratio"),
        )
    ]
    for found in needs:
        ratio = found.capacity / needs[0].capacity if needs[0].capacity else 0.0
        rows.append(
            (
                str(found.removed),
                *_counts(found),
                *_tails(found.served),
                f"{found.capacity:.2f}" if found.capacity else "",
                f"{ratio:.3f}" if ratio else "",
            )
        )
    return "\n".join(
        [
            f"{load.rate:g} requests/s of {lengths}, {100 * slo.attainment:g} % of them within "
            f"{levels}; {heading}",
            "",
            *table(rows),
        ]
    )


def _counts(found: Need) -> tuple[str, str]:
    if found.replicas is not None:
        return str(found.replicas), str(found.gpus)
    return ("does not fit" if found.served is None else "no number is enough"), ""


def _tails(served: Served | None) -> tuple[str, str, str]:
    if served is None:
        return "", "", ""
    return (
        f"{100 * served.attainment:.1f} %",
        f"{1e3 * served.ttft:.0f}",
        f"{1e3 * served.tpot:.1f}",
    )
