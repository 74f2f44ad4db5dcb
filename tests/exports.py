"""Manifests of given blocks, and checkpoints exported by them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.convert.export import export
from sleb_serve.manifest.binding import bind
from sleb_serve.manifest.schema import Manifest, Removal


def manifest_for(path: Path, removed: Sequence[int]) -> Manifest:
    return Manifest(bind(str(path), open_checkpoint(str(path))), tuple(map(Removal, removed)))


def exported(path: Path, removed: Sequence[int], folder: Path) -> Path:
    export(path, manifest_for(path, removed), folder)
    return folder
