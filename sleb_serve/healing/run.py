"""The main part of a healing: training, sidecars, the manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.healing.config import HealConfig
from sleb_serve.healing.pipeline import Work, state_path
from sleb_serve.healing.training import State, Trainer
from sleb_serve.healing.twin import Twin, adaptable
from sleb_serve.manifest.pruning import Pruning
from sleb_serve.manifest.repair_file import (
    LORA_A,
    WeightChanges,
    read_sidecar,
    sidecar_path,
    write_sidecar,
)
from sleb_serve.manifest.schema import Manifest, Repair, Training, perplexity_of
from sleb_serve.models.golden import golden
from sleb_serve.models.loading import EMULATED, has_fast, load_model


@dataclass(frozen=True)
class Healed:
    """One healing's result: its repair and its tensors by their sidecar names."""

    repair: Repair
    tensors: Mapping[str, Any]

    @property
    def rank(self) -> int:
        """Return the rank of the updates."""
        return len(next(tensor for name, tensor in self.tensors.items() if name.endswith(LORA_A)))

    def without(self, removed: Sequence[int], checkpoint: Checkpoint) -> Mapping[str, Any]:
        """Return the tensors outside of the removed blocks."""
        prefixes = tuple(f"{checkpoint.layer_prefix}{block}." for block in removed)
        return {n: tensor for n, tensor in self.tensors.items() if not n.startswith(prefixes)}


def run(work: Work) -> Manifest:
    """Heal each requested number of removals, and write the results."""
    manifest, config = work.manifest, work.config
    dense = load_model(work.checkpoint, _dtype(work.checkpoint, config), device=work.ranks.device)
    dense.requires_grad_(False)
    whole = len(manifest.removed)
    counts = sorted({*config.also, whole})
    healed: list[Healed] = []
    for blocks in counts:
        start = _earlier(work, blocks) or (healed[-1] if healed else None)
        healed.append(_heal(work, dense, blocks, start))
    changes = healed[-1].tensors
    known = manifest.golden
    prompt = list(work.mixture.held_out[0].tokens if known is None else known.tokens)
    result = replace(
        manifest,
        repairs=tuple(entry.repair for entry in healed),
        golden=golden(dense, prompt, manifest.blocks, WeightChanges(changes)),
        created_by={**manifest.created_by, **manifest.made_from},
        folder=work.output.parent,
        source=None,
    )
    if work.ranks.index == 0:
        result.write(work.output)
        for blocks in counts:
            state_path(work.output, blocks).unlink(missing_ok=True)
    return result


def _dtype(checkpoint: Checkpoint, config: HealConfig) -> str:
    """Choose the compute dtype: a CPU that would emulate 16 bits is faster in float32."""
    stored = checkpoint.dtype
    if config.dtype == "auto" and stored in EMULATED:
        # The range of float16 is too small for gradients.
        return "bfloat16" if has_fast("bfloat16") else "float32"
    return "bfloat16" if config.dtype == "float16" else config.dtype


def _earlier(work: Work, blocks: int) -> Healed | None:
    """Return the healing to continue from, if the user asked for it."""
    manifest = work.start.get(blocks)
    if manifest is None or manifest.repair is None:
        return None
    return Healed(manifest.repair, read_sidecar(manifest.pruning()).tensors)


def _heal(work: Work, dense: Any, blocks: int, start: Healed | None) -> Healed:
    """Heal the model without the first `blocks` removals, and write its sidecar.

    `start` is a healing of the same or of fewer removals.
    """
    manifest, config = work.manifest.prefix(blocks), work.config
    pruning = manifest.pruning()
    names = adaptable(dense, work.checkpoint, pruning.cut.kept, config.projections)
    rank = config.rank if start is None else start.rank
    twin = Twin(
        dense,
        pruning.removed,
        names,
        rank=rank,
        seed=config.seed,
        checkpointing=config.checkpointing,
    )
    stored = getattr(torch, work.checkpoint.dtype, torch.float32)
    try:
        trained = sum(factor.numel() for factor in twin.factors.values())
        work.progress.begins(blocks, trained, trained * stored.itemsize)
        trainer = Trainer(
            twin,
            work.mixture,
            config,
            work.ranks,
            state_path(work.output, blocks),
            _fingerprint(work, pruning, start),
            work.progress,
            {} if start is None else start.without(pruning.removed, work.checkpoint),
        )
        state = trainer.run(work.resume)
    finally:
        twin.close()
    tensors = {name: factor.to(stored).contiguous() for name, factor in state.best.items()}
    path = sidecar_path(work.output, None if blocks == len(work.manifest.removed) else blocks)
    digest = ""
    if work.ranks.index == 0:
        about = {"weights_sha256": pruning.weights_sha256, "removed": list(pruning.removed)}
        digest = write_sidecar(path, tensors, about)
    digest = work.ranks.gather([digest])[0]
    training = _training(config, rank, state, start)
    work.progress.ended(blocks, training, state.early)
    sequences = state.steps * config.batch_size
    sequences += 0 if start is None else start.repair.sequences
    return Healed(Repair("heal", path.name, digest, blocks, sequences, training=training), tensors)


def _training(config: HealConfig, rank: int, state: State, start: Healed | None) -> Training:
    before = None if start is None else start.repair.training
    first, best = state.judgements[0], state.best_judgement
    losses = {"dense": best.dense_loss, "pruned": first.loss, "healed": best.loss}
    texts = {Path(text).name: weight for text, weight in config.texts.items()}
    return Training(
        texts=texts if before is None else {**before.texts, **texts},
        tokens=state.tokens + (0 if before is None else before.tokens),
        rank=rank,
        seed=config.seed,
        perplexity={which: round(perplexity_of(loss) or 0.0, 4) for which, loss in losses.items()},
        agreement={
            "pruned": round(first.agreement, 4),
            "healed": round(best.agreement, 4),
        },
    )


def _fingerprint(work: Work, pruning: Pruning, start: Healed | None) -> str:
    """Return a fingerprint of the inputs: model and blocks, start, text, options."""
    digest = pruning.digest if start is None else pruning.digest + start.repair.sha256
    options: dict[str, Any] = {
        name: getattr(work.config, name)
        for name in work.config.__dataclass_fields__
        # Options that do not affect the result.
        if name not in ("texts", "sequences_at_once", "checkpointing", "also", "revision")
    }
    found = hashlib.sha256(json.dumps([digest, work.mixture.weights, options]).encode())
    for part in (*work.mixture.sources, work.mixture.held_out):
        for passage in part:
            found.update(passage.tokens.tobytes())
            found.update(passage.counts)
    return found.hexdigest()
