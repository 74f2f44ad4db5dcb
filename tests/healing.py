"""Healed tiny models, and Transformers models with factors merged by PEFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import oracle
from engines import Case
from sleb_serve import HealConfig, Manifest, heal
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.healing.config import Judgement, Progress
from sleb_serve.manifest.binding import bind
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.manifest.repair_file import LORA_A, LORA_B, sidecar_path
from sleb_serve.manifest.schema import Removal
from sleb_serve.serving.command import pruned_overrides

SMALL: dict[str, Any] = {
    "texts": {"python-docs": 1.0},
    "tokens": 1536,
    "rank": 4,
    "learning_rate": 0.05,
    "sequence_length": 32,
    "batch_size": 4,
    "sequences_at_once": 3,
    "held_out": 4,
    "patience": 20,
}
"""A training of 12 steps that changes a tiny model's answers well."""


REMOVED = (2, 3, 6)
COMMAND = (
    *("--text", "python-docs", "--tokens", "1K", "--rank", "4", "--sequence-length", "32"),
    *("--batch-size", "4", "--held-out", "4"),
)


class Told(Progress):
    """Remembers the judgements."""

    def __init__(self) -> None:
        self.judgements: list[Judgement] = []
        self.steps = 0

    def stepped(self, done: float, loss: float, tokens: int) -> None:
        self.steps += 1

    def judged(self, done: float, judgement: Judgement) -> None:
        self.judgements.append(judgement)


def removing(path: Path, removed: Sequence[int]) -> Manifest:
    return Manifest(
        bind(str(path), open_checkpoint(str(path))), tuple(Removal(block) for block in removed)
    )


def healed(
    path: Path,
    removed: Sequence[int],
    output: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    **changes: Any,
) -> Manifest:
    config = HealConfig(**{**SMALL, **changes})
    manifest = removing(path, removed)
    return heal(path, manifest, config, output, resume=resume, progress=progress)


def merged_by_peft(path: Path, removed: Sequence[int], factors: Mapping[str, torch.Tensor]) -> Any:
    """Transformers with a sidecar's factors in PEFT's layers, merged by it, and blocks skipped."""
    from peft import LoraConfig, get_peft_model

    model = oracle.load(path)
    modules = dict(model.named_modules())
    weights = sorted({name.removesuffix(LORA_A).removesuffix(LORA_B) for name in factors})
    targets = [name.removesuffix(".weight") for name in weights]
    assert all(isinstance(modules[target], nn.Linear) for target in targets)
    rank = len(factors[weights[0] + LORA_A])
    adapted: Any = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    )
    modules = dict(adapted.base_model.model.named_modules())
    for weight, target in zip(weights, targets, strict=True):
        modules[target].lora_A["default"].weight.data.copy_(factors[weight + LORA_A])
        modules[target].lora_B["default"].weight.data.copy_(factors[weight + LORA_B])
    return oracle.skip_blocks(adapted.merge_and_unload(), removed)


def oracle_of(path: Path, removed: Sequence[int], output: Path) -> Any:
    return merged_by_peft(path, removed, load_file(sidecar_path(output)))


def healed_job(path: Path, removed: Sequence[int], output: Path, **engine: Any) -> dict[str, Any]:
    """An engine's start with the healed manifest at `output`."""
    pruning = read_manifest(output).pruning()
    overrides = pruned_overrides(pruning, open_checkpoint(str(path)))
    return {**Case(path.name, tuple(removed)).job(path, **engine), "overrides": overrides}
