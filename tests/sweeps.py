"""Layer sweeps over tiny models and random tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.models.layerwise import CausalLM
from sleb_serve.models.loading import load_model
from sleb_serve.selection.layer_sweep import LayerSweep
from sleb_serve.selection.search import Score, Step, greedy, recorded
from tiny import VOCABULARY


def random_windows(count: int, length: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count, length), generator=generator).tolist()


def sweep_of(path: Path, sequences: list[list[int]], **options: Any) -> LayerSweep:
    checkpoint = open_checkpoint(str(path))
    model = load_model(checkpoint, "float32", streamed=options.get("streamed", False))
    return LayerSweep(CausalLM(model, sequences[0]), sequences, **options)


def greedy_steps(score: Score, **limits: Any) -> list[Step]:
    found: list[Step] = []
    greedy(recorded(score, (), found.append), **limits)
    return found


def search(path: Path, sequences: list[list[int]], remove: int, **barriers: int) -> list[Step]:
    sweep = sweep_of(path, sequences)
    return greedy_steps(sweep.score, num_blocks=len(sweep.model.layers), remove=remove, **barriers)
