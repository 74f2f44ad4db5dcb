"""What is compared: the dense model, its prunings, and what they are held against."""

from __future__ import annotations

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
"""What can run beside the dense model and its prunings."""
_AGAIN, _CAPPED = "-again", "-capped"
# Stock vLLM: no plugin at all is loaded.
_NO_PLUGIN = {"VLLM_PLUGINS": "none"}


@dataclass(frozen=True)
class Variant:
    """One of the models that take turns.

    Attributes:
        name: as in the records.
        blocks: how many are removed.
        spec: the engine to start.
        pruning: what is removed; None for the dense model.
        over: the variant that its ratio is taken over; None for the dense model.
        capped: give it the dense model's number of KV cache blocks.
    """

    name: str
    blocks: int
    spec: EngineSpec
    pruning: Pruning | None = None
    over: str | None = DENSE
    capped: bool = False

    def can(self, measure: str) -> bool:
        """Whether it can be measured so; see `Workload`."""
        return self.spec.backend == "vllm" or measure != "decode"

    def about(self) -> dict[str, Any]:
        """As it stands in the records."""
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


def processes(variants: Sequence[Variant], *, gpu: bool) -> dict[str, str]:
    """The process of each variant's engine, by a name of it.

    Engines of one process differ from start to start by less than can be measured; in processes of
    their own, the same two differed by up to a quarter. One process holds what runs on one CPU in
    the same environment. Several ranks have processes of their own anyway, and on a GPU each engine
    measures what memory its process may have.
    """
    found = {}
    for variant in variants:
        values = variant.spec.arguments
        ranks = [values.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline", "data")]
        alone = gpu or variant.spec.backend != "vllm" or variant.spec.environment
        found[variant.name] = variant.name if alone or ranks != [1, 1, 1] else "shared"
    return found


def is_beside(name: str) -> bool:
    """Whether a variant is something held against the dense model or a pruning, not one itself."""
    return "-" in name


def uncapped(name: str) -> str | None:
    """The pruning whose KV cache a variant may not have; None if it is not such a variant."""
    return name.removesuffix(_CAPPED) if name.endswith(_CAPPED) else None


def make_variants(
    manifests: Sequence[Manifest],
    checkpoint: Checkpoint,
    arguments: Mapping[str, Any],
    beside: Sequence[str],
    scratch: Path,
) -> tuple[Variant, ...]:
    """The dense model, each pruning, and for each pruning what `beside` names.

    Args:
        manifests: the prefixes to measure.
        checkpoint: the dense model.
        arguments: of ``vllm.LLM``, for all.
        beside: of `BESIDE`: ``dense``, a second dense engine (A/A); ``export``, the exported
            checkpoint in stock vLLM; ``capped``, the pruned model with the dense model's KV cache;
            ``transformers``, ``generate`` of Transformers.
        scratch: a folder for exported checkpoints.

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
