"""The parser and the options that the commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from sleb_serve.errors import SlebError
from sleb_serve.utils.lists import numbers

MODEL_HELP = "checkpoint folder or hub id"
MANIFEST_HELP = "a file, or org/name or hf://org/name@revision/file.json on the hub"


@dataclass(frozen=True)
class Command:
    """A command: its name, help, options and function.

    ``run`` returns the exit code.
    """

    name: str
    help: str
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    examples: str | None = None


def whole_number(text: str) -> int:
    """Parse an integer of at most 64 bits, as other code expects."""
    number = int(text)
    if abs(number) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text} is too large; give less than 2**63")
    return number


class Parser(argparse.ArgumentParser):
    """Argparse with one-line errors that point to --help."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.register("type", int, whole_number)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise SlebError(f"{message}; see `{self.prog} --help`")


def add_model(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add MODEL, the first argument of every command that takes one, and --revision."""
    parser.add_argument("model", metavar="MODEL", nargs=None if required else "?", help=MODEL_HELP)
    parser.add_argument(
        "--revision",
        metavar="REV",
        help="branch, tag or commit of a hub model (default: the manifest's, or the main branch)",
    )


def add_manifest(parser: argparse.ArgumentParser) -> None:
    """Add -m alone, for commands that need a whole manifest."""
    parser.add_argument("-m", "--manifest", metavar="M.json", required=True, help=MANIFEST_HELP)


def add_removal(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add -m, or a bare list of blocks instead."""
    given = parser.add_mutually_exclusive_group(required=required)
    given.add_argument("-m", "--manifest", metavar="M.json", help=MANIFEST_HELP)
    given.add_argument(
        "--removal-list",
        "--removal_list",
        metavar="'[5, 4, 9]'",
        help="the blocks to remove, in order, instead of a manifest",
    )


def add_blocks(parser: argparse.ArgumentParser) -> None:
    """Add --blocks with one number."""
    parser.add_argument(
        "--blocks", metavar="K", type=int, help="use only the manifest's first K removals"
    )


def add_counts(parser: argparse.ArgumentParser, text: str) -> None:
    """Add --blocks with several numbers."""
    parser.add_argument("--blocks", metavar="K,K…", type=numbers, help=text)


def add_sequence_length(parser: argparse._ActionsContainer, default: int = 2048) -> None:
    """Add --sequence-length."""
    parser.add_argument(
        "--sequence-length",
        metavar="L",
        type=int,
        help=f"tokens per sequence (default: {default}, or the model's context if shorter)",
    )


def add_tensor_parallel(parser: argparse._ActionsContainer) -> None:
    """Add --tensor-parallel-size, with vLLM's names."""
    parser.add_argument(
        "-tp",
        "--tensor-parallel-size",
        dest="tp",
        metavar="N",
        type=int,
        default=1,
        help="GPUs that share the model (default: 1)",
    )


def add_force(parser: argparse.ArgumentParser) -> None:
    """Add --force."""
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace existing output, even of another kind",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print JSON")
