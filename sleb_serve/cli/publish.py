"""``sleb-serve push``."""

from __future__ import annotations

import argparse
from pathlib import Path

from sleb_serve.cli.arguments import Command
from sleb_serve.cli.progress import tell
from sleb_serve.publishing.push import CARD, prepared, push
from sleb_serve.utils.sizes import format_size

_EXAMPLES = """\
examples:
  sleb-serve push m.json org/llama-2-70b-sleb16 --private
  sleb-serve push m.json org/llama-2-70b-sleb16 --dry-run      # show the files and the card
  sleb-serve serve meta-llama/Llama-2-70b-hf -m org/llama-2-70b-sleb16

Uploads the manifest as sleb_manifest.json, its repairs and a model card in one commit. A card not
written by sleb-serve is kept. Authenticate with `hf auth login` or HF_TOKEN.
"""


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", metavar="M.json", type=Path)
    parser.add_argument("repository", metavar="ORG/NAME", help="created if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument(
        "--revision",
        metavar="BRANCH",
        help="the branch to commit to, created if it does not exist (default: main)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show the files and the card, upload nothing"
    )


def _run(options: argparse.Namespace) -> int:
    if options.dry_run:
        upload = prepared(options.manifest, options.repository)
        for name, size in upload.sizes.items():
            tell(f"{format_size(size):>10}  {name}")
        card = upload.files[CARD]
        assert isinstance(card, bytes)
        tell(f"\n{card.decode()}")
        return 0
    found = push(
        options.manifest, options.repository, revision=options.revision, private=options.private
    )
    tell(f"pushed: -m {found}")
    return 0


COMMANDS = (
    Command("push", "upload a manifest to a Hugging Face hub repository", _add, _run, _EXAMPLES),
)
