"""The variants' servers, and load on them."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleb_bench.load import LoadError, LoadGenerator
from sleb_bench.server import RunningServer, Server, free_port
from sleb_bench.serving_options import INF, PRUNED, ServingOptions
from sleb_bench.variants import DENSE, Variant
from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.errors import SlebError
from sleb_serve.serving.command import server_command

if TYPE_CHECKING:
    from prometheus_client.samples import Sample

AnyServer = Server | RunningServer
_LOAD_TIMEOUT = 3600.0
_ANSWER_TIMEOUT = 10.0
# Engine arguments for the batch size, which the server sets itself.
_ENGINE_ONLY = frozenset({"max_num_batched_tokens", "max_num_seqs", "disable_log_stats", "model"})


@dataclass(frozen=True)
class Point:
    """One load: a request rate, or a number of concurrent requests."""

    rate: float
    concurrency: int | None = None

    def about(self) -> dict[str, Any]:
        """Return its record, with vLLM's field names."""
        return {
            "request_rate": "inf" if self.rate == INF else self.rate,
            "max_concurrency": self.concurrency,
        }

    def __str__(self) -> str:
        if self.concurrency is not None:
            return f"{self.concurrency} in flight"
        return "all at once" if self.rate == INF else f"{self.rate:.3g} requests/s"


class DeadServerError(SlebError):
    """A server no longer answers."""


class Loader:
    """Starts servers and generates load."""

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
        self.requests = options.requests

    def start(self, variant: Variant, arguments: Mapping[str, Any]) -> AnyServer:
        """Return the variant's server: the given running one, or a new one."""
        if self._options.urls:
            kind = DENSE if variant.name == DENSE else PRUNED
            return RunningServer(self._options.urls[kind])
        port = free_port()
        longest = self._options.input_length + self._options.output_length + 8
        values = {
            **arguments,
            # The lengths of a data set's prompts are unknown, so allow the model's maximum.
            "max_model_len": None if self._options.dataset else longest,
            "served_model_name": variant.name,
        }
        options = [*cli_options(values), "--host", "127.0.0.1", "--port", str(port)]
        command = server_command(str(arguments["model"]), options)
        log = self._folder / f"serve-{variant.name}.log"
        return Server(command, port, log, variant.spec.environment)

    def load(self, name: str, server: AnyServer, point: Point, number: int) -> dict[str, Any]:
        """Measure one point on one server: the JSON of ``vllm bench serve`` and prefix cache hits.

        Raises:
            DeadServerError: the server has died.
        """
        options = self._options
        before = _prefix_cache(server) if server.answers() else None
        if before is None:
            raise DeadServerError(_why(name, server, point))
        model = server.model if isinstance(server, RunningServer) else name
        arguments = [
            *("--base-url", server.url, "--model", model, "--backend", "openai"),
            *("--tokenizer", str(self._checkpoint.path), *self._prompts()),
            *("--num-prompts", str(options.requests), "--temperature", "0", "--ignore-eos"),
            *("--request-rate", str(point.rate), "--ready-check-timeout-sec", "0"),
            # The same prompts and arrival times for every variant.
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
            raise DeadServerError(_why(name, server, point)) from None
        result.pop("generated_texts", None)
        # Round times to 10 microseconds; unrounded they would dominate the record's size.
        result["itls"] = [[round(t, 5) for t in times] for times in result.get("itls", [])]
        if not server.answers():
            failed = f"; {result['failed']} of {options.requests} requests failed"
            raise DeadServerError(_why(name, server, point) + failed)
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

    def _prompts(self) -> list[str]:
        """Return options for random prompts or those of a data set; all answers have one length."""
        options = self._options
        if options.dataset is None:
            lengths = ("--random-input-len", str(options.input_length))
            answers = ("--random-output-len", str(options.output_length))
            return ["--dataset-name", "random", *lengths, *answers]
        kind = "custom" if options.dataset.suffix == ".jsonl" else "sharegpt"
        path, length = str(options.dataset), str(options.output_length)
        named = ["--dataset-name", kind, "--dataset-path", path, f"--{kind}-output-len", length]
        return [*named, "--skip-chat-template"]

    def _check(self, name: str, result: Mapping[str, Any]) -> None:
        """Check that every successful request has the requested number of tokens."""
        done = result["completed"]
        if result["total_output_tokens"] != done * self._options.output_length:
            raise SlebError(
                f"{name} answered {done} requests with {result['total_output_tokens']} tokens, not "
                f"{self._options.output_length} each: nothing to compare"
            )


def _why(name: str, server: AnyServer, point: Point) -> str:
    return f"the {name} server at {point} {server.state()}"


def cli_options(arguments: Mapping[str, Any]) -> list[str]:
    """Convert arguments of ``vllm.LLM`` to options of ``vllm serve``."""
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


def _samples(server: AnyServer) -> Iterator[Sample]:
    """Return the server's current metrics."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"{server.url}/metrics", timeout=_ANSWER_TIMEOUT) as reply:
        text: str = reply.read().decode()
    for family in text_string_to_metric_families(text):
        yield from family.samples


def _prefix_cache(server: AnyServer) -> tuple[float, float]:
    """Return prefix cache hits and lookups in tokens since the server's start."""
    totals = {"vllm:prefix_cache_hits_total": 0.0, "vllm:prefix_cache_queries_total": 0.0}
    for sample in _samples(server):
        if sample.name in totals:
            totals[sample.name] += sample.value
    hits, queries = totals.values()
    return hits, queries


def cache_blocks(server: AnyServer) -> int | None:
    """Return the number of KV cache blocks from the server's metrics."""
    for sample in _samples(server):
        count = sample.labels.get("num_gpu_blocks", "")
        if sample.name.startswith("vllm:cache_config_info") and count.isdecimal():
            return int(count)
    return None
