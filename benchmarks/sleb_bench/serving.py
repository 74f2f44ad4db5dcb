"""Load over HTTP: servers of all variants, each rate offered to them in turns."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleb_bench.load import LoadError, LoadGenerator
from sleb_bench.server import Server, free_port
from sleb_bench.variants import DENSE, Variant
from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.errors import SlebError
from sleb_serve.serving.command import server_command

if TYPE_CHECKING:
    from prometheus_client.samples import Sample

INF = float("inf")
LADDER = (0.25, 0.5, 0.8, 1.1)
"""The rates offered where none are named, as shares of what the dense model can take."""
SLO_METRICS = ("ttft", "tpot", "e2el")
_LOAD_TIMEOUT = 3600.0
_ANSWER_TIMEOUT = 10.0
_REASON_LENGTH = 300
# Of the engine's arguments, those that size one batch are left to the server, which fills its own.
_ENGINE_ONLY = frozenset({"max_num_batched_tokens", "max_num_seqs", "disable_log_stats", "model"})


@dataclass(frozen=True)
class ServingOptions:
    """The serving workload.

    Attributes:
        rates: requests/s offered; `INF` for all at once. Empty for a ladder up to saturation, made
            from what the dense model takes.
        concurrency: requests in flight at most, each offered without limit of rate; may be empty.
        requests: how many at each point.
        input_length: tokens of a prompt.
        output_length: tokens of an answer.
        slo: the service level in milliseconds by metric (`SLO_METRICS`): a request that meets it
            counts for the goodput. The default is MLPerf Inference's for Llama-2-70B as a server.
        rounds: how often every point is measured.
    """

    rates: tuple[float, ...] = ()
    concurrency: tuple[int, ...] = ()
    requests: int = 64
    input_length: int = 128
    output_length: int = 32
    slo: Mapping[str, float] = field(default_factory=lambda: {"ttft": 2000.0, "tpot": 200.0})
    rounds: int = 3

    def check(self) -> None:
        """Refuse what measures nothing.

        Raises:
            SlebError: naming the option.
        """
        lengths = (self.requests, self.input_length, self.rounds, *self.concurrency)
        if min(lengths) < 1:
            raise SlebError("--serving-…: numbers of requests, tokens and rounds start at 1")
        if self.output_length < 2:
            raise SlebError("--serving-output-length must be at least 2, or there is no TPOT")
        if any(not rate > 0 for rate in self.rates):
            raise SlebError("--request-rates are above 0, in requests per second, or inf")
        for name, limit in self.slo.items():
            if name not in SLO_METRICS or not limit > 0:
                raise SlebError(
                    f"--slo {name}:{limit:g}: give milliseconds for {', '.join(SLO_METRICS)}, as "
                    f"ttft:2000,tpot:200"
                )


@dataclass(frozen=True)
class Point:
    """One load: so many requests a second, or so many in flight."""

    rate: float
    concurrency: int | None = None

    def about(self) -> dict[str, Any]:
        """As it stands in the records, and in vLLM's own."""
        return {
            "request_rate": "inf" if self.rate == INF else self.rate,
            "max_concurrency": self.concurrency,
        }

    def __str__(self) -> str:
        if self.concurrency is not None:
            return f"{self.concurrency} in flight"
        return "all at once" if self.rate == INF else f"{self.rate:.3g} requests/s"


class _DeadServerError(SlebError):
    """A server that no longer answers."""


def serve_and_load(
    options: ServingOptions,
    checkpoint: Checkpoint,
    variants: Sequence[Variant],
    folder: Path,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Measure every point on every variant's server, in turns.

    A server that dies ends its own measurements with a ``failure`` record, and no other's.

    Args:
        options: the points and their size.
        checkpoint: the model, for the tokenizer of the load generator.
        variants: those that vLLM serves are measured.
        folder: where the servers' and the load generator's output goes.
        say: told how it goes.

    Yields:
        Records of ``serving``, with the JSON of ``vllm bench serve`` as it is, and of ``failure``.

    Raises:
        SlebError: a server did not start.
    """
    served = [variant for variant in variants if variant.spec.backend == "vllm"]
    with ExitStack() as stack:
        generator = stack.enter_context(LoadGenerator(folder / "load.log"))
        bench = _Bench(options, checkpoint, folder, generator, say)
        servers: dict[str, Server] = {}
        yield from _start(bench, served, servers, stack)
        points: list[Point] = []
        for number in range(options.rounds + 1):
            # Round 0 warms up, and finds what the dense model takes where no rates were named.
            for point in points if number else [Point(INF)]:
                order = served if number % 2 else served[::-1]
                for entry in _load(bench, order, servers, point, number):
                    # Before it is handed on: whoever takes it may change it.
                    if not number and (entry["record"], entry["variant"]) == ("serving", DENSE):
                        points = _points(options, entry["result"]["request_throughput"])
                    yield entry
            if not servers:
                return


def _start(
    bench: _Bench, served: Sequence[Variant], servers: dict[str, Server], stack: ExitStack
) -> Iterator[dict[str, Any]]:
    """Start every variant's server, one after another; they stop with `stack`."""
    blocks: int | None = None
    for variant in served:
        arguments = dict(variant.spec.arguments)
        if variant.capped:
            arguments["num_gpu_blocks_override"] = blocks
        server = bench.start(variant, arguments)
        stack.callback(server.stop)
        servers[variant.name] = server
        begin = time.perf_counter()
        server.wait()
        took = time.perf_counter() - begin
        if variant.name == DENSE:
            blocks = _cache_blocks(server)
        bench.say(f"{variant.name}: server ready in {took:.0f} s")
        command = list(server.command)
        yield {
            "record": "server",
            "variant": variant.name,
            "startup_time": took,
            "command": command,
        }


def _load(
    bench: _Bench,
    order: Sequence[Variant],
    servers: dict[str, Server],
    point: Point,
    number: int,
) -> Iterator[dict[str, Any]]:
    """One point on every server that lives."""
    for variant in order:
        name = variant.name
        if name not in servers:
            continue
        try:
            result = bench.load(name, servers[name], point, number)
        except _DeadServerError as error:
            del servers[name]
            bench.say(str(error))
            yield {"record": "failure", "variant": name, "what": str(error)}
            continue
        about = {"record": "serving", "variant": name, "round": number}
        yield {**about, **point.about(), "result": result}


def _points(options: ServingOptions, dense: float) -> list[Point]:
    """The points to measure; `dense` is the requests/s that the dense model takes."""
    rates = options.rates or (*(float(f"{share * dense:.2g}") for share in LADDER), INF)
    return [
        *(Point(rate) for rate in rates),
        *(Point(INF, concurrency) for concurrency in options.concurrency),
    ]


class _Bench:
    """Starts servers and puts load on them."""

    def __init__(
        self,
        options: ServingOptions,
        checkpoint: Checkpoint,
        folder: Path,
        generator: LoadGenerator,
        say: Callable[[str], None],
    ) -> None:
        self._options, self._checkpoint, self._folder = options, checkpoint, folder
        self._generator, self.say = generator, say

    def start(self, variant: Variant, arguments: Mapping[str, Any]) -> Server:
        """The variant's server."""
        port = free_port()
        longest = self._options.input_length + self._options.output_length + 8
        values = {
            **arguments,
            "max_model_len": longest,
            "served_model_name": variant.name,
        }
        options = [*cli_options(values), "--host", "127.0.0.1", "--port", str(port)]
        command = server_command(str(arguments["model"]), options)
        log = self._folder / f"serve-{variant.name}.log"
        return Server(command, port, log, variant.spec.environment)

    def load(self, name: str, server: Server, point: Point, number: int) -> dict[str, Any]:
        """One point on one server: the JSON of ``vllm bench serve``, and the prefix cache's hits.

        Raises:
            _DeadServerError: the server is gone.
        """
        options = self._options
        before = _prefix_cache(server) if server.answers() else None
        if before is None:
            raise _DeadServerError(self._why(name, server, point))
        arguments = [
            *("--base-url", server.url, "--model", name, "--backend", "openai"),
            *("--tokenizer", str(self._checkpoint.path), "--dataset-name", "random"),
            *("--random-input-len", str(options.input_length)),
            *("--random-output-len", str(options.output_length)),
            *("--num-prompts", str(options.requests), "--temperature", "0", "--ignore-eos"),
            *("--request-rate", str(point.rate), "--ready-check-timeout-sec", "0"),
            # The same prompts and the same times of arrival for every variant.
            *("--seed", str(1000 * number + (point.concurrency or 0))),
            *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,90,99"),
            *("--goodput", *(f"{metric}:{limit:g}" for metric, limit in options.slo.items())),
            *("--save-detailed", "--disable-tqdm"),
        ]
        if point.concurrency is not None:
            arguments += ["--max-concurrency", str(point.concurrency)]
        try:
            result = self._generator.run(arguments, _LOAD_TIMEOUT)
        except LoadError:
            if server.answers():
                raise
            raise _DeadServerError(self._why(name, server, point)) from None
        result.pop("generated_texts", None)
        # Times to 10 microseconds; as they come they would be most of the record.
        result["itls"] = [[round(t, 5) for t in times] for times in result.get("itls", [])]
        if not server.answers():
            failed = f"; {result['failed']} of {options.requests} requests failed"
            raise _DeadServerError(self._why(name, server, point) + failed)
        self._check(name, result)
        after = _prefix_cache(server)
        hits, queries = after[0] - before[0], after[1] - before[1]
        result["prefix_cache_hit_rate"] = hits / queries if queries else 0.0
        self.say(
            f"{'round ' + str(number) if number else 'warm-up'}, {point}: {name} "
            f"{result['output_throughput']:.1f} tokens/s, TTFT p50 {result['p50_ttft_ms']:.0f} ms, "
            f"{result['failed']} failed"
        )
        return result

    def _check(self, name: str, result: Mapping[str, Any]) -> None:
        """Every request that succeeded must have had the tokens asked for."""
        done = result["completed"]
        if result["total_output_tokens"] != done * self._options.output_length:
            raise SlebError(
                f"{name} answered {done} requests with {result['total_output_tokens']} tokens, not "
                f"{self._options.output_length} each: nothing to compare"
            )

    @staticmethod
    def _why(name: str, server: Server, point: Point) -> str:
        code = server.process.poll()
        how = "does not answer" if code is None else f"ended with exit code {code}"
        return f"the {name} server {how} at {point}; its output is in {server.log}"


def cli_options(arguments: Mapping[str, Any]) -> list[str]:
    """Arguments of ``vllm.LLM`` as options of ``vllm serve``."""
    options = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if name in _ENGINE_ONLY or value is None:
            continue
        if isinstance(value, bool):
            options.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            text = json.dumps(value) if isinstance(value, dict | list) else str(value)
            options += [f"--{flag}", text]
    return options


def _samples(server: Server) -> Iterator[Sample]:
    """What the server's metrics hold now."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"{server.url}/metrics", timeout=_ANSWER_TIMEOUT) as reply:
        text: str = reply.read().decode()
    for family in text_string_to_metric_families(text):
        yield from family.samples


def _prefix_cache(server: Server) -> tuple[float, float]:
    """Tokens found in the prefix cache and tokens looked up, since the server's start."""
    totals = {"vllm:prefix_cache_hits_total": 0.0, "vllm:prefix_cache_queries_total": 0.0}
    for sample in _samples(server):
        if sample.name in totals:
            totals[sample.name] += sample.value
    hits, queries = totals.values()
    return hits, queries


def _cache_blocks(server: Server) -> int | None:
    """The KV cache's blocks, as the server says in its metrics."""
    for sample in _samples(server):
        count = sample.labels.get("num_gpu_blocks", "")
        if sample.name.startswith("vllm:cache_config_info") and count.isdecimal():
            return int(count)
    return None
