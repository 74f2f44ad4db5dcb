"""Search progress for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sleb_serve.data.calibration import Sequences
from sleb_serve.errors import SlebError, first_line
from sleb_serve.selection.config import Progress
from sleb_serve.selection.search import Step

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge

    from sleb_serve.roofline.target import SpeedTarget
    from sleb_serve.selection.repair import Gap


class SearchMetrics(Progress):
    """Forwards a search's progress, and serves it at ``/metrics``.

    Args:
        shown: receives all events, too.
        port: port to listen on; 0 for any free port.

    Raises:
        SlebError: the port is not available.
    """

    def __init__(self, shown: Progress, port: int) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

        self._shown = shown
        self._registry = CollectorRegistry()

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"sleb_select_{name}", text, registry=self._registry)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"sleb_select_{name}", text, registry=self._registry)

        self._steps = counter("steps", "Finished steps, those of an earlier run included.")
        self._layers = counter("layer_runs", "Runs of a layer on one sequence's states.")
        self._tokens = counter("layer_tokens", "Tokens that those runs had, a state each.")
        self._step_layers = gauge("step_layer_runs", "Runs that the step under way takes in all.")
        self._candidates = gauge("candidates", "Blocks that the step under way chooses from.")
        self._block = gauge("last_block", "The block removed last.")
        self._loss = gauge("loss", "Calibration loss after the last step, nats per token.")
        self._seconds = gauge("last_step_seconds", "How long the last step took.")
        self._length = 0
        self._begun = time.monotonic()
        try:
            self._server, self._thread = start_http_server(port, registry=self._registry)
        except (OSError, OverflowError) as error:
            raise SlebError(
                f"metrics_port={port}: {first_line(error)}; choose another port"
            ) from error
        self.port: int = self._server.server_port

    def __enter__(self) -> SearchMetrics:
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def loaded(self, sequences: Sequences, resumed: Sequence[Step], how: str) -> None:
        """The model and the text are loaded."""
        self._length = sequences.calibration.sequence_length
        for step in resumed:
            self._note(step)
        self._shown.loaded(sequences, resumed, how)

    def reading(self, done: int, total: int) -> None:
        """Nothing to count."""
        self._shown.reading(done, total)

    def aimed(self, target: SpeedTarget, blocks: int) -> None:
        """There is nothing to count yet."""
        self._shown.aimed(target, blocks)

    def step_begins(self, number: int, candidates: int, layers: int) -> None:
        """A step begins."""
        self._begun = time.monotonic()
        self._candidates.set(candidates)
        self._step_layers.set(layers)
        self._shown.step_begins(number, candidates, layers)

    def advance(self) -> None:
        """A layer ran."""
        self._layers.inc()
        self._tokens.inc(self._length)
        self._shown.advance()

    def step_ended(self, number: int, step: Step) -> None:
        """A step ended."""
        self._seconds.set(time.monotonic() - self._begun)
        self._note(step)
        self._shown.step_ended(number, step)

    def repaired(self, gaps: Sequence[Gap], loss: float) -> None:
        """The gaps were repaired."""
        self._loss.set(loss)
        self._shown.repaired(gaps, loss)

    def _note(self, step: Step) -> None:
        self._steps.inc()
        self._block.set(step.block)
        self._loss.set(step.loss)
