"""Options of the HTTP workloads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sleb_bench.variants import DENSE
from sleb_serve.errors import SlebError

INF = float("inf")
SLO_METRICS = ("ttft", "tpot", "e2el")
PRUNED = "pruned"
_DATASETS = (".json", ".jsonl")


@dataclass(frozen=True)
class ServingOptions:
    """The serving workload.

    Attributes:
        rates: requests/s; `INF` for all at once. Empty for a ladder up to the dense model's
            saturation.
        concurrency: limits on concurrent requests, each without a rate limit; may be empty.
        requests: number of requests at each point.
        input_length: tokens per prompt.
        output_length: tokens per answer.
        slo: the service level in milliseconds by metric (`SLO_METRICS`): a request that meets it
            counts for the goodput. The default is MLPerf Inference's for Llama-2-70B as a server.
        rounds: number of measurements of each point.
        dataset: prompts from a ShareGPT file (.json) or lines with a ``prompt`` (.jsonl); None for
            random tokens.
        urls: running servers by `DENSE` and `PRUNED`; empty to start new ones.
    """

    rates: tuple[float, ...] = ()
    concurrency: tuple[int, ...] = ()
    requests: int = 64
    input_length: int = 128
    output_length: int = 32
    slo: Mapping[str, float] = field(default_factory=lambda: {"ttft": 2000.0, "tpot": 200.0})
    rounds: int = 3
    dataset: Path | None = None
    urls: Mapping[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse invalid values.

        Raises:
            SlebError: names the option.
        """
        lengths = (self.requests, self.input_length, self.rounds, *self.concurrency)
        if min(lengths) < 1:
            raise SlebError("--serving-…: numbers of requests, tokens and rounds start at 1")
        if self.output_length < 2:
            raise SlebError("--serving-output-length must be at least 2, or there is no TPOT")
        if any(not rate > 0 for rate in self.rates):
            raise SlebError("--request-rates must be above 0 (requests per second), or inf")
        for name, limit in self.slo.items():
            if name not in SLO_METRICS or not limit > 0:
                raise SlebError(
                    f"--slo {name}={limit:g}ms: give times for {', '.join(SLO_METRICS)}, as "
                    f"ttft=2000ms,tpot=200ms"
                )
        if self.dataset is not None:
            if self.dataset.suffix not in _DATASETS:
                raise SlebError(
                    f"--dataset {self.dataset}: give a ShareGPT file (.json), or lines of "
                    f'{{"prompt": …}} (.jsonl)'
                )
            if not self.dataset.is_file():
                raise SlebError(f"--dataset {self.dataset}: no such file")
        if self.urls and set(self.urls) != {DENSE, PRUNED}:
            raise SlebError("--dense and --pruned: give both, each a server's address")
