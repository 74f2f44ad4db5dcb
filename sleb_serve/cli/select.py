"""``sleb-serve select``."""

from __future__ import annotations

import argparse
import re
from contextlib import ExitStack
from decimal import Decimal, InvalidOperation
from pathlib import Path

from sleb_serve.cli.arguments import (
    Command,
    add_force,
    add_model,
    add_sequence_length,
    add_tensor_parallel,
)
from sleb_serve.cli.progress import SearchBars, say, tell
from sleb_serve.data.texts import EMBEDDED, HUB_TEXTS
from sleb_serve.errors import SlebError
from sleb_serve.evaluation.report import describe
from sleb_serve.manifest.schema import OBJECTIVES
from sleb_serve.roofline.gpu import GPUS
from sleb_serve.roofline.target import LOADS, SpeedTarget
from sleb_serve.selection.config import DTYPES, SEARCHES, Progress, SelectConfig
from sleb_serve.selection.log import log_path
from sleb_serve.selection.metrics import SearchMetrics
from sleb_serve.selection.pipeline import select
from sleb_serve.utils.atomic_io import is_stream
from sleb_serve.utils.distributed import is_first
from sleb_serve.utils.sizes import parse_size

_EXAMPLES = """\
examples:
  sleb-serve select meta-llama/Llama-2-70b-hf -o llama-70b.json --remove 0.2
  sleb-serve select facebook/opt-6.7b -o opt.json --remove 7 --calibration c4 --rows 128
  sleb-serve select ./my-model -o m.json --remove 6 --calibration chats.jsonl \\
      --sequences 16 --sequence-length 1024
  sleb-serve select ./my-model -o m.json --remove 6 --repair fold --repair-sequences 64
  sleb-serve select ./my-model -o m.json --until 'perplexity<1.15x'
  sleb-serve select ./my-model -o m.json --target-speedup 1.25 --gpu H100-80G -tp 2
  sleb-serve select ./my-model -o m.json --remove 6 --search fast --seeds 3
  sleb-serve select ./huge-model -o m.json --remove 0.2 --memory-budget 16GiB
  accelerate launch --num_processes 2 -m sleb_serve.cli select ./my-model -o m.json --remove 6
  sleb-serve select ./my-model -o m.json --remove 6 --resume    # after an interruption

Rows of a .jsonl, .jsonl.gz or .parquet file hold a text or a chat, which is formatted with the
model's chat template: {"text": …}, {"messages": [{"role": …, "content": …}]},
{"conversations": [{"from": …, "value": …}]}, {"instruction": …, "input": …, "output": …} or
{"prompt": …, "completion": …}.

M.json.search.jsonl records every candidate of every step. A repair's weights are in
M.json.repair.safetensors; keep it next to M.json wherever you serve it.
"""
_LIMIT = re.compile(r"\s*perplexity\s*<\s*(\d{1,6}(?:\.\d{1,6})?)\s*x\s*")


def _add(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("-o", "--output", metavar="M.json", type=Path, required=True)
    parser.add_argument(
        "--remove",
        metavar="N|SHARE",
        type=amount,
        help="number of blocks to remove (6), or a share of them, rounded up (0.2)",
    )
    parser.add_argument(
        "--until",
        metavar="'perplexity<1.15x'",
        type=limit,
        help="remove blocks while the perplexity on the calibration text is below this multiple "
        "of the dense model's (at most --remove blocks, if given)",
    )
    _add_target(parser.add_argument_group("speed, instead of --remove"))
    _add_text(parser.add_argument_group("calibration text"))
    _add_search(parser.add_argument_group("search"))
    _add_repair(parser.add_argument_group("repair"))
    parser.add_argument(
        "--resume", action="store_true", help="keep the finished steps of an interrupted search"
    )
    add_force(parser)
    parser.add_argument(
        "--metrics-port",
        metavar="PORT",
        type=int,
        help="report progress to Prometheus on this port (0 for any free port)",
    )


def _add_target(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--target-speedup",
        metavar="X",
        type=float,
        help="remove enough blocks to be X times as fast as dense, according to the roofline",
    )
    parser.add_argument(
        "--gpu", metavar="NAME", default="A100-80G", help=f"{', '.join(GPUS)} (default: A100-80G)"
    )
    add_tensor_parallel(parser)
    parser.add_argument(
        "--load",
        choices=LOADS,
        default=LOADS[0],
        help="workload to speed up: generation of 64 sequences of 64 + 128 tokens, or a prompt "
        "of 2,048 tokens (default: generation)",
    )


def _add_text(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--calibration",
        metavar="TEXT",
        default=SelectConfig.calibration,
        help=f"{', '.join(HUB_TEXTS)}, {EMBEDDED} (needs no download), or a .txt, .jsonl, "
        ".jsonl.gz or .parquet file of texts or chats (default: wikitext2)",
    )
    parser.add_argument(
        "--sequences",
        metavar="N",
        type=int,
        help="sequences of text (default: all from the rows; 8 for files)",
    )
    add_sequence_length(parser)
    parser.add_argument(
        "--rows",
        metavar="R",
        type=int,
        help="rows of wikitext2 or c4 (default: 128, or as many as --sequences needs)",
    )
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="shuffles the rows")


def _add_search(parser: argparse._ArgumentGroup) -> None:
    for name, side in (("early", "first"), ("late", "last")):
        parser.add_argument(
            f"--{name}-barrier",
            metavar="B",
            type=int,
            default=1,
            help=f"number of {side} blocks to keep",
        )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="compute dtype (default: the checkpoint's; float32 for a 16-bit one on a CPU that "
        "would emulate it)",
    )
    parser.add_argument(
        "--search",
        choices=SEARCHES,
        default=SelectConfig.search,
        help="greedy: exactly the official algorithm's result; fast: drop candidates that are "
        "unlikely to win, same result with a probability of 95 %% (default: greedy)",
    )
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES,
        help="loss to minimise: nll, on the text, as in the paper; kl, the divergence from the "
        "dense model's predictions; embedding, the distance of the last hidden states (default: "
        "nll; embedding for pooling models)",
    )
    parser.add_argument(
        "--seeds",
        metavar="S",
        type=int,
        default=1,
        help="repeat the search on S samples of the text and record how much the lists overlap; "
        "the first list is used (default: 1)",
    )
    parser.add_argument(
        "--memory-budget",
        metavar="SIZE",
        type=parse_size,
        help="limit for weights, states and working memory, e.g. 16GiB; a larger model is read "
        "layer by layer (default: 80 %% of the free memory)",
    )


def _add_repair(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--repair",
        choices=("none", "fold"),
        default="none",
        help="fold: fit the weights before each gap to the removed blocks in closed form; costs "
        "nothing when serving (default: none)",
    )
    parser.add_argument(
        "--repair-sequences",
        metavar="N",
        type=int,
        help="sequences of text to fit the repair on; more is better and cheap compared with the "
        "search (default: those of the search)",
    )


def amount(text: str) -> int | float:
    """Parse a count or a share: 0.2 is a share, 1 is one block.

    Raises:
        SlebError: the text is not a number.
    """
    try:
        number = Decimal(text)
    except InvalidOperation:
        raise SlebError(
            f"--remove {text}: give a whole number of blocks (6) or a share between 0 and 1 (0.2)"
        ) from None
    whole = number.is_finite() and abs(number) < 1 << 31 and number == int(number)
    return int(number) if whole else float(number)


def limit(text: str) -> float:
    """Parse a limit relative to the dense model: ``perplexity<1.15x``.

    Raises:
        SlebError: the text has another form.
    """
    match = _LIMIT.fullmatch(text)
    if match is None:
        raise SlebError(f"--until {text}: give a limit as perplexity<1.15x")
    return float(match[1])


def _run(options: argparse.Namespace) -> int:
    names = SelectConfig.__dataclass_fields__.keys() - {"target"}
    target = None
    if options.target_speedup is not None:
        target = SpeedTarget(options.target_speedup, options.gpu, options.tp, options.load)
    config = SelectConfig(target=target, **{name: getattr(options, name) for name in names})
    with ExitStack() as stack:
        bars = stack.enter_context(SearchBars())
        progress: Progress = bars
        if options.metrics_port is not None and is_first():
            metrics = stack.enter_context(SearchMetrics(bars, options.metrics_port))
            say(f"metrics: http://localhost:{metrics.port}/metrics")
            progress = metrics
        manifest = select(
            options.model,
            config,
            options.output,
            resume=options.resume,
            force=options.force,
            progress=progress,
        )
    if is_first():
        tell(describe(manifest))
        log = "" if is_stream(options.output) else f" and {log_path(options.output)}"
        tell(f"\nwrote {options.output}{log}")
    return 0


COMMANDS = (
    Command("select", "find the blocks to remove, write a manifest", _add, _run, _EXAMPLES),
)
