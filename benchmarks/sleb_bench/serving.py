"""HTTP load on the servers of all variants, in turns for each rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sleb_bench.load import LoadGenerator
from sleb_bench.server import Server
from sleb_bench.serving_load import AnyServer, DeadServerError, Loader, Point, cache_blocks
from sleb_bench.serving_options import INF, ServingOptions
from sleb_bench.slo import met, next_rate
from sleb_bench.variants import DENSE, Variant
from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.utils.signals import signals_held

LADDER = (0.25, 0.5, 0.8, 1.1)
"""Default rates, as shares of the dense model's saturation."""


def serve_and_load(
    options: ServingOptions,
    checkpoint: Checkpoint,
    variants: Sequence[Variant],
    folder: Path,
    say: Callable[[str], None],
    *,
    ladder: bool = True,
    search: bool = False,
) -> Generator[dict[str, Any], None, None]:
    """Measure every point on every variant's server in turns.

    If a server dies, only its own measurements end, with a ``failure`` record.

    Args:
        options: the points and their size.
        checkpoint: the model, for the tokenizer of the load generator.
        variants: the variants; only those that vLLM serves are measured.
        folder: folder for the output of the servers and the load generator.
        say: receives progress messages.
        ladder: whether to measure the points.
        search: whether to search for the highest rate at which each variant meets the service
            level.

    Yields:
        Records of ``serving`` and ``slo``, with the unmodified JSON of ``vllm bench serve``, and of
        ``failure``.

    Raises:
        SlebError: a server did not start.
    """
    served = [variant for variant in variants if variant.spec.backend == "vllm"]
    with ExitStack() as stack:
        generator = stack.enter_context(LoadGenerator(folder / "load.log"))
        bench = Loader(options, checkpoint, folder, generator, say)
        servers: dict[str, AnyServer] = {}
        yield from _start(bench, served, servers, stack)
        # Round 0 warms up, and measures each model's saturation.
        capacity: dict[str, float] = {}
        for entry in _load(bench, served[::-1], servers, Point(INF), 0):
            _note(entry, capacity)
            yield entry
        points = _points(options, capacity.get(DENSE)) if ladder else []
        for number in range(1, options.rounds + 1):
            for point in points:
                order = served if number % 2 else served[::-1]
                for entry in _load(bench, order, servers, point, number):
                    if point == Point(INF):
                        _note(entry, capacity)
                    yield entry
        if search:
            yield from _search(bench, served, servers, capacity)


def _note(entry: Mapping[str, Any], capacity: dict[str, float]) -> None:
    """Note a server's highest throughput, before a receiver of the entry may change it."""
    if entry["record"] == "serving":
        name, found = entry["variant"], float(entry["result"]["request_throughput"])
        capacity[name] = max(found, capacity.get(name, 0.0))


def _search(
    bench: Loader,
    served: Sequence[Variant],
    servers: dict[str, AnyServer],
    capacity: Mapping[str, float],
) -> Iterator[dict[str, Any]]:
    """Search for the highest rates within the service level, alternating between variants."""
    tried: dict[str, list[tuple[float, float]]] = {name: [] for name in capacity}
    step = 0
    while True:
        step, loaded = step + 1, False
        for variant in served:
            name = variant.name
            rate = next_rate(tried[name], capacity[name]) if name in servers else None
            if rate is None:
                continue
            loaded = True
            # Rounds use much lower seeds.
            for entry in _load(bench, [variant], servers, Point(rate), 1000 + step):
                if entry["record"] == "serving":
                    share = met(entry["result"], bench.requests)
                    tried[name].append((rate, share))
                    about = {"round": step, "met": share, "capacity": capacity[name]}
                    yield {**entry, "record": "slo", **about}
                else:
                    yield entry
        if not loaded:
            return


def _start(
    bench: Loader, served: Sequence[Variant], servers: dict[str, AnyServer], stack: ExitStack
) -> Iterator[dict[str, Any]]:
    """Start every variant's server, one after another; `stack` stops them."""
    blocks: int | None = None
    for variant in served:
        arguments = dict(variant.spec.arguments)
        if variant.capped:
            arguments["num_gpu_blocks_override"] = blocks
        with signals_held():
            server = bench.start(variant, arguments)
            stack.callback(server.stop)
        servers[variant.name] = server
        begin = time.perf_counter()
        server.wait()
        took = time.perf_counter() - begin
        if variant.name == DENSE:
            blocks = cache_blocks(server)
        own = isinstance(server, Server)
        bench.say(f"{variant.name}: server ready" + (f" in {took:.0f} s" if own else ""))
        command = list(server.command)
        yield {
            "record": "server",
            "variant": variant.name,
            "startup_time": took if own else None,  # another's server ran before
            "command": command,
        }


def _load(
    bench: Loader,
    order: Sequence[Variant],
    servers: dict[str, AnyServer],
    point: Point,
    number: int,
) -> Iterator[dict[str, Any]]:
    """Measure one point on every live server."""
    for variant in order:
        name = variant.name
        if name not in servers:
            continue
        try:
            result = bench.load(name, servers[name], point, number)
        except DeadServerError as error:
            del servers[name]
            bench.say(str(error))
            yield {"record": "failure", "variant": name, "what": str(error)}
            continue
        about = {"record": "serving", "variant": name, "round": number}
        yield {**about, **point.about(), "result": result}


def _points(options: ServingOptions, dense: float | None) -> list[Point]:
    """Return the points to measure; `dense` is the dense model's saturation rate, if alive."""
    rates = options.rates
    if not rates:
        rates = (*(float(f"{share * dense:.2g}") for share in LADDER), INF) if dense else (INF,)
    return [
        *(Point(rate) for rate in rates),
        *(Point(INF, concurrency) for concurrency in options.concurrency),
    ]
