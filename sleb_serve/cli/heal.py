"""``sleb-serve heal``."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from sleb_serve.cli.arguments import (
    Command,
    add_force,
    add_manifest,
    add_model,
    add_sequence_length,
)
from sleb_serve.cli.progress import HealBars, tell
from sleb_serve.data.texts import EMBEDDED, HUB_TEXTS
from sleb_serve.errors import SlebError
from sleb_serve.evaluation.report import describe
from sleb_serve.healing.config import DEFAULT_LENGTH, DEFAULT_TOKENS, HealConfig
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.selection.config import DTYPES
from sleb_serve.utils.distributed import is_first
from sleb_serve.utils.extras import require
from sleb_serve.utils.lists import numbers, words

_EXAMPLES = """\
examples:
  sleb-serve heal meta-llama/Llama-2-7b-hf -m m.json -o healed.json --text c4 --tokens 2M
  sleb-serve heal ./my-model -m m.json -o healed.json --text wikitext2:1,chats.jsonl:2
  sleb-serve heal ./my-model -m m.json -o healed.json --text chats.jsonl --minutes 90 --rank 64
  sleb-serve heal ./my-model -m m.json -o healed.json --text c4 --also 2,4    # for --blocks, too
  accelerate launch --num_processes 8 -m sleb_serve.cli heal ./my-model -m m.json -o healed.json
  sleb-serve heal ./my-model -m healed.json -o more.json --text chats.jsonl --further
  sleb-serve heal ./my-model -m m.json -o healed.json --text c4 --resume

The dense model teaches the pruned one; both share one copy of the weights in memory. Only low-rank
updates of the kept weights are trained. They are written to healed.json.repair.safetensors; keep it
next to healed.json wherever you serve it. The server adds them to the weights at load time, so
serving costs nothing.
"""
_COUNT = re.compile(r"(\d{1,12}(?:\.\d{1,9})?)([KMB]?)", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def _add(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_manifest(parser)
    parser.add_argument("-o", "--output", metavar="HEALED.json", type=Path, required=True)
    text = parser.add_argument_group("text")
    text.add_argument(
        "--text",
        dest="texts",
        metavar="TEXT[:WEIGHT],…",
        type=weighted,
        default={"wikitext2": 1.0},
        help=f"{', '.join(HUB_TEXTS)}, {EMBEDDED}, or .txt, .jsonl, .jsonl.gz or .parquet files of "
        "texts or chats, each with a weight; in chats, only the answers are learned (default: "
        "wikitext2)",
    )
    add_sequence_length(text, DEFAULT_LENGTH)
    text.add_argument(
        "--held-out",
        metavar="N",
        type=int,
        default=HealConfig.held_out,
        help="sequences held out from training for validation (default: %(default)s)",
    )
    text.add_argument("--seed", metavar="S", type=int, default=0, help="shuffles the text")
    _add_training(parser.add_argument_group("training"))
    parser.add_argument(
        "--also",
        metavar="K,K…",
        type=numbers,
        default=(),
        help="also heal the manifest's first K removals, one after another",
    )
    parser.add_argument(
        "--further",
        action="store_true",
        help="continue from the healing in M.json, at its rank, optionally on other text",
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted healing")
    add_force(parser)


def _add_training(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--tokens",
        metavar="N",
        type=count,
        help=f"tokens to train on, e.g. 500K or 2M (default: {DEFAULT_TOKENS // 10**6}M, unless "
        "--minutes is given)",
    )
    parser.add_argument("--minutes", metavar="M", type=float, help="maximum training time")
    parser.add_argument(
        "--rank",
        metavar="R",
        type=int,
        default=HealConfig.rank,
        help="rank of each weight's update (default: %(default)s)",
    )
    parser.add_argument(
        "--projections",
        metavar="NAME,…",
        type=words,
        help="train only these weights, e.g. q_proj,v_proj (default: all linear ones)",
    )
    parser.add_argument(
        "--learning-rate",
        metavar="LR",
        type=float,
        default=HealConfig.learning_rate,
        help="peak rate, after a warm-up; decays to zero (default: %(default)s)",
    )
    add_step(parser)
    parser.add_argument(
        "--sequences-at-once",
        metavar="N",
        type=int,
        default=HealConfig.sequences_at_once,
        help="sequences that pass through the model at once (default: %(default)s)",
    )
    parser.add_argument(
        "--patience",
        metavar="N",
        type=int,
        default=HealConfig.patience,
        help="stop after N of the 20 validations without improvement (default: %(default)s)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="compute dtype")


def add_step(parser: argparse._ArgumentGroup, prefix: str = "") -> None:
    """Add the options of a training step."""
    parser.add_argument(
        f"--{prefix}batch-size",
        dest="batch_size",
        metavar="N",
        type=int,
        default=HealConfig.batch_size,
        help="sequences per step, over all processes; few for little text or time (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--no-checkpointing",
        dest="checkpointing",
        action="store_false",
        help="turn off activation checkpointing: faster, more memory",
    )


def weighted(text: str) -> dict[str, float]:
    """Parse texts with weights: ``wikitext2:1,chats.jsonl:2``. The default weight is 1.

    Raises:
        SlebError: a text is duplicated or has no name.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        name, colon, weight = part.rpartition(":")
        try:
            value = float(weight) if colon else 1.0
        except ValueError:
            value, colon = 1.0, ""
        name = name if colon else part
        if not name or name in found:
            raise SlebError(f"--text {text}: name each text once, as wikitext2:1,chats.jsonl:2")
        found[name] = value
    return found


def count(text: str) -> int:
    """Parse a count, such as 500K or 2M.

    Raises:
        SlebError: the text is not a count.
    """
    match = _COUNT.fullmatch(text)
    number = round(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if number < 1:
        raise SlebError(f"--tokens {text}: give a count, as 500K or 2M")
    return number


def _run(options: argparse.Namespace) -> int:
    require("heal", "peft", "torch", "transformers", "accelerate")
    from sleb_serve.healing.pipeline import heal

    names = HealConfig.__dataclass_fields__
    config = HealConfig(**{name: getattr(options, name) for name in names})
    manifest = read_manifest(options.manifest, repairs=False)
    with HealBars() as bars:
        healed = heal(
            options.model,
            manifest,
            config,
            options.output,
            resume=options.resume,
            force=options.force,
            progress=bars,
        )
    if is_first():
        files = " and ".join(repair.file for repair in healed.repairs)
        tell(describe(healed))
        tell(f"\nwrote {options.output} and {files}")
    return 0


COMMANDS = (
    Command("heal", "train a pruned model to predict like the dense one", _add, _run, _EXAMPLES),
)
