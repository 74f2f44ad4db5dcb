"""A readiness probe: the server serves this manifest and reproduces its golden prompt."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from sleb_serve.errors import SlebError
from sleb_serve.manifest.schema import Manifest
from sleb_serve.protocol import MANIFEST_PATH
from sleb_serve.serving.client import Client, ServerError
from sleb_serve.utils import strict_json

TOLERANCE = 0.1
"""Allowed mean difference of log-probabilities (nats) from rounding: twice the observed difference
in 16 bits; a wrong block causes several times as much.
"""
_NOT_FOUND = 404


@dataclass(frozen=True)
class Probed:
    """Result of a probe.

    ``difference`` is the mean absolute difference of the golden prompt's log-probabilities; None if
    the manifest has none.
    """

    digest: str
    ranks: int
    difference: float | None

    def to_text(self) -> str:
        """Return a one-line summary."""
        golden = (
            "no golden log-probabilities in this manifest for this number of blocks"
            if self.difference is None
            else f"golden log-probabilities within {self.difference:.4f} nats"
        )
        return f"ready: manifest {self.digest[:8]} on {self.ranks} rank(s), {golden}"


@dataclass(frozen=True)
class _Served:
    """A server's report: its manifest's digest and each rank's."""

    digest: str
    ranks: tuple[str, ...]


class NotReadyError(SlebError):
    """The server does not serve this manifest, or serves it incorrectly."""


def probe(client: Client, manifest: Manifest, tolerance: float = TOLERANCE) -> Probed:
    """Compare a running server with `manifest`, cut to the served prefix.

    Raises:
        NotReadyError: it serves another model, or its results differ.
        ServerError: it does not answer.
    """
    pruning = manifest.pruning()
    served = _served_by(client)
    if served.digest != pruning.digest:
        raise NotReadyError(
            f"{client.url} serves manifest {served.digest[:8]}, not {pruning.digest[:8]}"
        )
    ranks = served.ranks
    if set(ranks) != {pruning.digest}:
        raise NotReadyError(f"{client.url}: not every rank serves manifest {pruning.digest[:8]}")
    if manifest.golden is None:
        return Probed(pruning.digest, len(ranks), None)
    golden = manifest.golden
    answer = client.complete(client.model(), golden.tokens, 1, score=True)
    if len(answer.prompt_logprobs) != len(golden.logprobs):
        raise NotReadyError(
            f"{client.url} gave {len(answer.prompt_logprobs)} log-probabilities for the golden "
            f"prompt, not {len(golden.logprobs)}"
        )
    difference = fmean(
        abs(found - expected)
        for found, expected in zip(answer.prompt_logprobs, golden.logprobs, strict=True)
    )
    # Written so that NaN fails.
    if not difference <= tolerance:
        raise NotReadyError(
            f"{client.url}: the golden prompt's log-probabilities are {difference:.4f} nats off on "
            f"average, more than {tolerance:g}: it does not run the selected model"
        )
    return Probed(pruning.digest, len(ranks), difference)


def _served_by(client: Client) -> _Served:
    try:
        return client.get(MANIFEST_PATH, _read_served)
    except ServerError as error:
        if error.status != _NOT_FOUND:
            raise
        raise NotReadyError(
            f"{client.url}{MANIFEST_PATH} does not exist: a dense model, or a server whose "
            f"VLLM_PLUGINS does not name sleb (`sleb-serve serve` does)"
        ) from error


def _read_served(answer: object) -> _Served:
    fields = strict_json.any_object(answer, "the answer")
    ranks = strict_json.list_(fields.get("ranks"), "ranks")
    return _Served(
        strict_json.line(fields.get("digest"), "digest"),
        tuple(
            strict_json.line(
                strict_json.any_object(rank, f"ranks[{i}]").get("digest"), f"ranks[{i}].digest"
            )
            for i, rank in enumerate(ranks)
        ),
    )
