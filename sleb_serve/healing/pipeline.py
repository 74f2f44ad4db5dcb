"""Healing from end to end: a model, a manifest and text in, a repaired manifest out."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.cut.servable import check_servable
from sleb_serve.data.tokenizer import context_length, load_tokenizer
from sleb_serve.data.training import Mixture, make_mixture
from sleb_serve.errors import SlebError
from sleb_serve.healing.config import DEFAULT_LENGTH, HealConfig, Progress
from sleb_serve.healing.training import State, Trainer
from sleb_serve.healing.twin import Twin, adaptable
from sleb_serve.manifest.binding import check_model, revision_of
from sleb_serve.manifest.repair_file import WeightChanges, sidecar_path, write_sidecar
from sleb_serve.manifest.schema import Manifest, Repair, Training, perplexity_of
from sleb_serve.models.golden import golden
from sleb_serve.models.loading import EMULATED, generates, has_fast, load_model
from sleb_serve.utils.atomic_io import check_writable
from sleb_serve.utils.distributed import Ranks, launched

_MOST_TOKENS = 20_000_000
"""Read of the texts where time alone ends the training; then they begin again."""


@dataclass(frozen=True)
class _Work:
    """One healing, checked: all that each number of removals shares."""

    checkpoint: Checkpoint
    manifest: Manifest
    config: HealConfig
    output: Path
    mixture: Mixture
    ranks: Ranks
    resume: bool
    progress: Progress


def heal(
    model: str | Path,
    manifest: Manifest,
    config: HealConfig,
    output: str | Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Train what is left of a pruned model to predict what the dense model predicts.

    Args:
        model: checkpoint folder or hub id of the dense model.
        manifest: what is removed. Another repair that it has is left out of the result.
        config: on what to train, and how.
        output: where to write the healed manifest, and beside it the weights' changes.
        resume: go on where a healing for `output` was interrupted.
        progress: told how it goes.

    Returns:
        The manifest with its repairs.

    Raises:
        SlebError: what was asked for cannot be done; nothing was written, or nothing more than the
            state to go on from.
    """
    work = _prepared(str(model), manifest, config, Path(output), resume, progress or Progress())
    dense = load_model(work.checkpoint, _dtype(work.checkpoint, config), device=work.ranks.device)
    dense.requires_grad_(False)
    counts = sorted({*config.also, len(manifest.removed)})
    healed = [_heal(work, dense, blocks) for blocks in counts]
    changes = {repair.blocks: tensors for repair, tensors in healed}[len(manifest.removed)]
    prompt = list(
        work.mixture.held_out[0].tokens if manifest.golden is None else manifest.golden.tokens
    )
    result = replace(
        work.manifest,
        repairs=tuple(repair for repair, _ in healed),
        golden=golden(dense, prompt, manifest.blocks, WeightChanges(changes)),
        folder=work.output.parent,
    )
    if work.ranks.index == 0:
        result.write(work.output)
        for blocks in counts:
            _state_path(work, blocks).unlink(missing_ok=True)
    return result


def _prepared(
    model: str,
    manifest: Manifest,
    config: HealConfig,
    output: Path,
    resume: bool,
    progress: Progress,
) -> _Work:
    """What can be refused before the model is loaded."""
    config.check()
    check_writable(output)
    # A fold's weights would be in the teacher, too.
    manifest = replace(manifest, repairs=())
    for blocks in config.also:
        manifest.prefix(blocks)
    pruning = manifest.pruning()
    revision = revision_of(model, manifest, config.revision)
    checkpoint = check_model(model, pruning, revision, servable=False, fetch=True)
    checkpoint.check_layers()
    check_servable(checkpoint, pruning.cut)
    if checkpoint.is_quantised():
        raise SlebError(
            f"{checkpoint.path} is quantised, and a change of its weights would be lost in them; "
            f"heal the model that it was made from, and quantise what `export` writes"
        )
    if not generates(checkpoint):
        raise SlebError(
            f"{checkpoint.architecture} predicts no tokens, and healing is learning to predict"
        )
    ranks = launched()
    if config.batch_size < ranks.count:
        raise SlebError(
            f"batch_size={config.batch_size}: {ranks.count} processes share a step, and each needs "
            f"a sequence; give a larger `batch_size`, or launch fewer"
        )
    return _Work(
        checkpoint, manifest, config, output, _mixture(checkpoint, config), ranks, resume, progress
    )


def _mixture(checkpoint: Checkpoint, config: HealConfig) -> Mixture:
    context = context_length(checkpoint)
    length = config.sequence_length or min(DEFAULT_LENGTH, context)
    if length > context:
        raise SlebError(
            f"sequence_length={length} is more than the model's context of {context} tokens; ask "
            f"for less"
        )
    most = -(-(config.budget or _MOST_TOKENS) // length)
    return make_mixture(
        config.texts,
        load_tokenizer(checkpoint),
        length=length,
        most=most,
        held_out=config.held_out,
        seed=config.seed,
    )


def _dtype(checkpoint: Checkpoint, config: HealConfig) -> str:
    """What to compute in: a CPU that would emulate 16 bits is faster in float32."""
    stored = checkpoint.dtype
    if config.dtype == "auto" and stored in EMULATED:
        # float16 has too small a range for gradients.
        return "bfloat16" if has_fast("bfloat16") else "float32"
    return "bfloat16" if config.dtype == "float16" else config.dtype


def _heal(work: _Work, dense: Any, blocks: int) -> tuple[Repair, dict[str, Any]]:
    """Heal the model without the first `blocks` removals, and write its sidecar."""
    manifest, config = work.manifest.prefix(blocks), work.config
    pruning = manifest.pruning()
    names = adaptable(dense, work.checkpoint, pruning.cut.kept, config.projections)
    twin = Twin(
        dense,
        pruning.removed,
        names,
        rank=config.rank,
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
            _state_path(work, blocks),
            _fingerprint(work, pruning.digest),
            work.progress,
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
    training = _training(config, state)
    work.progress.ended(blocks, training, state.early)
    sequences = state.steps * config.batch_size
    return Repair("heal", path.name, digest, blocks, sequences, training=training), tensors


def _training(config: HealConfig, state: State) -> Training:
    first, best = state.judgements[0], state.best_judgement
    losses = {"dense": best.dense_loss, "pruned": first.loss, "healed": best.loss}
    return Training(
        texts={Path(text).name: weight for text, weight in config.texts.items()},
        tokens=state.tokens,
        rank=config.rank,
        seed=config.seed,
        perplexity={which: round(perplexity_of(loss) or 0.0, 4) for which, loss in losses.items()},
        agreement={
            "pruned": round(first.agreement, 4),
            "healed": round(best.agreement, 4),
        },
    )


def _state_path(work: _Work, blocks: int) -> Path:
    return work.output.with_name(f"{work.output.name}.heal-{blocks}.state")


def _fingerprint(work: _Work, digest: str) -> str:
    """Of all that a result depends on: model and blocks, text, options."""
    options: dict[str, Any] = {
        name: getattr(work.config, name)
        for name in work.config.__dataclass_fields__
        # What only says how the work is cut into pieces, or for what else.
        if name not in ("texts", "sequences_at_once", "checkpointing", "also", "revision")
    }
    found = hashlib.sha256(json.dumps([digest, work.mixture.weights, options]).encode())
    for part in (*work.mixture.sources, work.mixture.held_out):
        for passage in part:
            found.update(passage.tokens.tobytes())
            found.update(passage.counts)
    return found.hexdigest()
