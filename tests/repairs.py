"""Repairs fitted to random tokens, and applied to Transformers models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import oracle
from engines import Case, check_size, differences, greedy_equal
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.manifest.binding import bind
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.manifest.repair_file import sidecar_path, write_sidecar
from sleb_serve.manifest.schema import Manifest, Removal, Repair
from sleb_serve.models.layerwise import CausalLM
from sleb_serve.models.loading import load_model
from sleb_serve.selection.repair import Gap, fit
from sleb_serve.serving.command import pruned_overrides
from sweeps import random_windows


def fitted(path: Path, removed: Sequence[int], count: int = 20, length: int = 240) -> list[Gap]:
    sequences, checkpoint = random_windows(count, length), open_checkpoint(str(path))
    model = CausalLM(load_model(checkpoint, "float32"), sequences[0])
    own: torch.dtype = getattr(torch, checkpoint.dtype)
    found: list[Gap] = fit(model, sequences, removed, own)[0]
    return found


def repaired(path: Path, removed: Sequence[int], tensors: dict[str, torch.Tensor]) -> Any:
    """Transformers with the blocks skipped and a repair's weights applied."""
    model = oracle.load(path)
    own = dict(model.named_parameters())
    for name, tensor in tensors.items():
        own[name].data.copy_(tensor)
    return oracle.skip_blocks(model, removed)


def manifest_of(path: Path, removed: Sequence[int], output: Path, **text: int) -> Manifest:
    found = fitted(path, removed, **text)
    digest = write_sidecar(sidecar_path(output), {gap.name: gap.weight for gap in found}, {})
    manifest = Manifest(
        bind(str(path), open_checkpoint(str(path))),
        tuple(Removal(block) for block in removed),
        repairs=(Repair("fold", sidecar_path(output).name, digest, len(removed), 12),),
    )
    manifest.write(output)
    return read_manifest(output)


def repaired_job(
    path: Path,
    removed: tuple[int, ...],
    manifest: Path,
    text: dict[str, int] | None = None,
    **engine: Any,
) -> dict[str, Any]:
    """An engine's start with a repair that is fitted now, on so much text."""
    found = manifest_of(path, removed, manifest, **(text or {}))
    overrides = pruned_overrides(found.pruning(), open_checkpoint(str(path)))
    return {**Case(path.name, removed).job(path, **engine), "overrides": overrides}


def check_repaired(
    result: dict[str, Any], path: Path, removed: tuple[int, ...], manifest: Path
) -> None:
    """Compare an engine with Transformers with the repair's weights."""
    check_answers(result, repaired(path, removed, load_file(sidecar_path(manifest))), path, removed)


def check_answers(result: dict[str, Any], model: Any, path: Path, removed: tuple[int, ...]) -> None:
    """Compare an engine with a repaired Transformers model."""
    assert max(differences(result, model)) < 1e-3
    assert greedy_equal(result, model)
    check_size(result, path, Case(path.name, removed))
    # The repair is large enough that its absence would fail.
    assert max(differences(result, oracle.pruned(path, removed))) > 1e-2
