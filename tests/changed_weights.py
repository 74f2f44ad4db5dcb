"""Checkpoints that the quick digest cannot tell from a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from sleb_serve.cli.main import main

EMBEDDING = "model.embed_tokens.weight"
REMOVED = (2, 5)


def weight(block: int) -> str:
    """A tensor of 128 KiB."""
    return f"model.layers.{block}.mlp.up_proj.weight"


def flip_middle(name: str) -> Callable[[dict[str, Any]], None]:
    """Change the lowest bit of a byte in the middle of a tensor, between two samples."""

    def change(tensors: dict[str, Any]) -> None:
        raw = tensors[name].reshape(-1).view(np.uint8)
        raw[raw.size // 2] ^= 1

    return change


def another_row(tensors: dict[str, Any]) -> None:
    """Another embedding of one token, all of whose bytes lie between two samples."""
    tensors[EMBEDDING][200] = np.random.default_rng(0).normal(size=128)


def noise(tensors: dict[str, Any]) -> None:
    """Noise in all bytes that the quick digest does not read."""
    generator = np.random.default_rng(0)
    for tensor in tensors.values():
        values = tensor.reshape(-1)
        if tensor.nbytes > 4 * 4096:
            unread = np.ones(values.size, bool)
            for sample in range(4):
                first = sample * (tensor.nbytes - 4096) // 3
                unread[first // 4 : -(-(first + 4096) // 4)] = False
            values[unread] = generator.normal(size=int(unread.sum()))


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "byte": (flip_middle(weight(3)), "the full digest of block 3 differs"),
    "row": (another_row, "the full digest of what lies outside the blocks differs"),
    "removed": (flip_middle(weight(5)), "the full digest of block 5 differs"),
    "noise": (noise, "the full digest of what lies outside the blocks and 8 more differs"),
}
"""What only the full digest sees, and what is said of it."""


def changed_models(model: Path, folder: Path) -> Path:
    """Folders by name: `model`, one for each change, `sharded`; and `m.json`, the model's."""
    shutil.copytree(model, folder / "model")
    asked = ["import", str(folder / "model"), json.dumps(REMOVED), "-o", str(folder / "m.json")]
    assert main(asked) == 0
    for name, (change, _) in CHANGES.items():
        shutil.copytree(model, folder / name)
        rewrite(folder / name, change)
    _shard(folder / "model", folder / "sharded")
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the tensors of a checkpoint in one file."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.copy() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def _shard(model: Path, folder: Path) -> None:
    """The removed blocks in a shard of their own, and the others' tensors by turns in two."""
    shutil.copytree(model, folder)
    (folder / "model.safetensors").unlink()
    shards: dict[str, dict[str, Any]] = {f"{name}.safetensors": {} for name in ("a", "b", "gone")}
    for number, (name, tensor) in enumerate(load_file(model / "model.safetensors").items()):
        gone = any(f".layers.{block}." in name for block in REMOVED)
        shards["gone.safetensors" if gone else f"{'ab'[number % 2]}.safetensors"][name] = tensor
    for name, tensors in shards.items():
        save_file(tensors, folder / name, {"format": "pt"})
    places = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
