"""Reports of a server's ranks: compared with the manifest and exported to Prometheus."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sleb_serve.errors import SlebError
from sleb_serve.manifest.pruning import Pruning


@dataclass(frozen=True)
class Built:
    """Report of one rank: decoder layers by original index, parameter count.

    ``weights_read_bytes`` are those of the checkpoint's tensors outside the removed layers,
    ``weights_skipped_bytes`` those inside; None before they are loaded, and for a checkpoint in
    PyTorch's own format, which is read whole. ``weights_compared`` is the digest that the weights
    were compared by, ``quick`` or ``full``; None before, and for random ones.
    """

    pruning: Pruning
    layers: tuple[int, ...]
    parameters: int
    weights_read_bytes: int | None = None
    weights_skipped_bytes: int | None = None
    weights_compared: str | None = None

    def report(self, rank: int) -> dict[str, Any]:
        """Return plain values for the API server."""
        return {
            "rank": rank,
            "digest": self.pruning.digest,
            "layers": list(self.layers),
            "parameters": self.parameters,
            "weights_read_bytes": self.weights_read_bytes,
            "weights_skipped_bytes": self.weights_skipped_bytes,
            "weights_compared": self.weights_compared,
        }

    def to_text(self) -> str:
        """Return a log line."""
        return (
            f"Pruned by manifest {self.pruning.tag}: {len(self.layers)} of "
            f"{self.pruning.num_blocks} decoder layers built, removed {list(self.pruning.removed)} "
            f"(LoRA adapters' too); {self.parameters} parameters on this rank, "
            f"{self.weights_read_bytes} bytes of weights read, {self.weights_skipped_bytes} bytes "
            f"of removed layers skipped"
        )


def check_ranks(pruning: Pruning, reports: Sequence[Mapping[str, Any] | None]) -> None:
    """Refuse ranks that do not together hold exactly the manifest's kept blocks.

    Raises:
        SlebError: names the rank and its blocks.
    """
    held: set[int] = set()
    for number, report in enumerate(reports):
        if report is None:
            raise SlebError(f"rank {number} serves no pruned model; restart the server")
        if report["digest"] != pruning.digest:
            raise SlebError(
                f"rank {report['rank']} holds manifest {report['digest'][:8]}, the server "
                f"{pruning.digest[:8]}; restart it with one manifest"
            )
        held |= set(report["layers"])
    kept = set(pruning.cut.kept)
    if held != kept:
        raise SlebError(
            f"the ranks hold decoder layers {sorted(held)} where the manifest leaves "
            f"{sorted(kept)}; this vLLM cannot serve the model pruned"
        )


def publish(pruning: Pruning, name: str, reports: list[dict[str, Any]]) -> None:
    """Set the manifest's metrics; several API servers set the same values."""
    info, removed, loaded, skipped = _gauges()
    info.labels(digest=pruning.digest, tag=pruning.tag, model_name=name).set(1)
    removed.labels(model_name=name).set(len(pruning.removed))
    layers = {layer for report in reports for layer in report["layers"]}
    loaded.labels(model_name=name).set(len(layers))
    # Every rank skips the same tensors of the same files.
    skipped.labels(model_name=name).set(max(r["weights_skipped_bytes"] or 0 for r in reports))


@functools.cache
def _gauges() -> tuple[Any, ...]:
    from prometheus_client import Gauge

    def gauge(name: str, text: str, *labels: str) -> Any:
        # vLLM would sum over its API servers; all report the same, so keep the most recent value.
        return Gauge(
            f"sleb_serve_{name}", text, ["model_name", *labels], multiprocess_mode="mostrecent"
        )

    return (
        gauge("manifest_info", "The removal manifest that is served.", "digest", "tag"),
        gauge("blocks_removed", "Decoder blocks that the manifest removes."),
        gauge("blocks_loaded", "Decoder blocks that the ranks hold."),
        gauge("weights_skipped_bytes", "Bytes of removed blocks' weights that were not read."),
    )
