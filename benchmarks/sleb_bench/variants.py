"""The compared variants: the dense model, its prunings, and references."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleb_bench.engine import EngineSpec
from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.convert.export import export
from sleb_serve.manifest.pruning import Pruning
from sleb_serve.manifest.schema import Manifest
from sleb_serve.serving.command import engine_arguments

DENSE = "dense"
BESIDE = ("dense", "export", "capped", "transformers")
"""Optional variants besides the dense model and its prunings."""
_AGAIN, _CAPPED = "-again", "-capped"
# Stock vLLM without any plugin.
_NO_PLUGIN = {"VLLM_PLUGINS": "none"}


@dataclass(frozen=True)
class Variant:
    """A model that takes turns.

    Attributes:
        name: its name in the records.
        blocks: number of removed blocks.
        spec: the engine to start.
        pruning: the pruning; None for the dense model.
        over: the reference of its ratio; None for the dense model.
        capped: whether it has the dense model's number of KV cache blocks.
    """

    name: str
    blocks: int
    spec: EngineSpec
    pruning: Pruning | None = None
    over: str | None = DENSE
    capped: bool = False

    def can(self, measure: str) -> bool:
        """Return whether it supports a measure; see `Workload`."""
        return self.spec.backend == "vllm" or measure != "decode"

    def about(self) -> dict[str, Any]:
        """Return its record."""
        return {
            "variant": self.name,
            "blocks": self.blocks,
            "over": self.over,
            "backend": self.spec.backend,
            "engine_arguments": dict(self.spec.arguments),
            "environment": dict(self.spec.environment),
            "pruning": None if self.pruning is None else self.pruning.to_dict(),
            "pruning_digest": None if self.pruning is None else self.pruning.digest,
        }


def ranks(arguments: Mapping[str, Any]) -> int:
    """Return the number of ranks, each with a device of its own, of an engine's arguments."""
    kinds = ("tensor", "pipeline", "data")
    return math.prod(int(arguments.get(f"{kind}_parallel_size", 1)) for kind in kinds)


def processes(variants: Sequence[Variant], *, gpu: bool) -> dict[str, str]:
    """Return the process name of each variant's engine.

    Engines in one process do not differ measurably between starts; in separate processes, the same
    two differed by up to a quarter. Engines on one CPU with the same environment share a process.
    Several ranks always have their own processes, and on a GPU each engine measures its process's
    available memory.
    """
    found = {}
    for variant in variants:
        spec = variant.spec
        alone = gpu or spec.backend != "vllm" or spec.environment or ranks(spec.arguments) > 1
        found[variant.name] = variant.name if alone else "shared"
    return found


def is_beside(name: str) -> bool:
    """Return whether a variant is only a reference."""
    return "-" in name


def uncapped(name: str) -> str | None:
    """Return the pruning of a variant with a capped KV cache; None for other variants."""
    return name.removesuffix(_CAPPED) if name.endswith(_CAPPED) else None


def make_variants(
    manifests: Sequence[Manifest],
    checkpoint: Checkpoint,
    arguments: Mapping[str, Any],
    beside: Sequence[str],
    scratch: Path,
) -> tuple[Variant, ...]:
    """Return the dense model, each pruning, and for each pruning the variants in `beside`.

    Args:
        manifests: the prunings to measure.
        checkpoint: the dense model.
        arguments: ``vllm.LLM`` arguments for all.
        beside: of `BESIDE`: ``dense``, a second dense engine (A/A); ``export``, the exported
            checkpoint in stock vLLM; ``capped``, the pruned model with the dense model's KV cache;
            ``transformers``, ``generate`` of Transformers.
        scratch: folder for exported checkpoints.

    Raises:
        SlebError: the model cannot be exported.
    """
    dense = EngineSpec("vllm", dict(arguments))
    found = [Variant(DENSE, 0, dense, over=None)]
    if "dense" in beside:
        found.append(Variant(f"{DENSE}{_AGAIN}", 0, dense))
    for manifest in manifests:
        found += _of(manifest, checkpoint, arguments, beside, scratch)
    return tuple(found)


def _of(
    manifest: Manifest,
    checkpoint: Checkpoint,
    arguments: Mapping[str, Any],
    beside: Sequence[str],
    scratch: Path,
) -> list[Variant]:
    pruning = manifest.pruning()
    count = len(manifest.removed)
    name = f"sleb{count}"
    pruned = EngineSpec("vllm", engine_arguments(pruning, checkpoint, arguments))
    found = [Variant(name, count, pruned, pruning)]
    if "capped" in beside:
        found.append(Variant(f"{name}{_CAPPED}", count, pruned, pruning, capped=True))
    if "export" in beside:
        folder = scratch / name
        export(checkpoint.path, manifest, folder)
        spec = EngineSpec("vllm", {**arguments, "model": str(folder)}, _NO_PLUGIN)
        found.append(Variant(f"{name}-export", count, spec, pruning, over=name))
    if "transformers" in beside:
        values = {"model": str(checkpoint.path), "pruning": pruning.to_dict()}
        spec = EngineSpec("transformers", {**values, "dtype": arguments.get("dtype", "auto")})
        found.append(Variant(f"{name}-transformers", count, spec, pruning, over=name))
    return found
