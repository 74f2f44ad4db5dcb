"""Common parts of the studies of drafts: their arguments, and how the draft is served."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.manifest.binding import bind
from sleb_serve.manifest.schema import Manifest, Removal
from sleb_serve.serving.speculative import draft_options


def parser_of(text: str, rounds: int) -> argparse.ArgumentParser:
    """Return the parser of a study: model, folder, blocks, draft length and number of rounds."""
    parser = argparse.ArgumentParser(description=text.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--removed", type=lambda text: tuple(map(int, text.split(","))))
    parser.add_argument("--tokens", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=rounds)
    return parser


def speculation(options: argparse.Namespace, model: str) -> list[str]:
    """Return the options of ``vllm serve`` that let the pruned `model` draft.

    The draft's folder is under the study's folder.
    """
    os.environ["XDG_CACHE_HOME"] = str(options.folder.resolve() / "cache")
    checkpoint = open_checkpoint(model)
    manifest = Manifest(bind(model, checkpoint), tuple(map(Removal, options.removed)))
    return draft_options(model, checkpoint, manifest.pruning(), (), options.tokens)
