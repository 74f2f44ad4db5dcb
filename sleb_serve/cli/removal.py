"""The manifest named on the command line, or one built from a bare list of blocks."""

from __future__ import annotations

import argparse

from sleb_serve.checkpoint.hub import download_weights, open_checkpoint
from sleb_serve.convert.lists import manifest_of, read_blocks
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.manifest.schema import Manifest


def manifest_of_options(options: argparse.Namespace, model: str | None = None) -> Manifest:
    """Read the manifest of -m, or build one in memory from --removal-list."""
    if options.removal_list is None:
        return read_manifest(options.manifest)
    model = model or options.model
    revision = getattr(options, "revision", None)
    download_weights(model, revision)
    checkpoint = open_checkpoint(model, revision)
    blocks = read_blocks(options.removal_list, checkpoint.num_blocks).blocks
    return manifest_of(model, checkpoint, blocks, "--removal-list")
