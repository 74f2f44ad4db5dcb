"""``sleb-serve probe`` and ``sleb-serve canary``: checks of running servers."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from tqdm import tqdm

from sleb_serve.cli.arguments import Command, add_blocks, add_json, add_manifest
from sleb_serve.cli.progress import say, tell
from sleb_serve.errors import SlebError
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.serving.address import key_of_environment
from sleb_serve.serving.canary import CONCURRENCY, canary, read_prompts
from sleb_serve.serving.client import Client, ServerError
from sleb_serve.serving.probe import TOLERANCE, NotReadyError, probe

_PROBE_EXAMPLES = """\
examples:
  sleb-serve probe http://localhost:8000 -m m.json
  sleb-serve probe http://localhost:8000 -m m.json --blocks 4

Compares every rank's manifest, and the model's log-probabilities with those that `select` stored.
Exit code: 0 if the server is ready, 1 if not, 2 if the check could not run.
"""
_CANARY_EXAMPLES = """\
examples:
  sleb-serve canary --dense http://localhost:8000 --pruned http://localhost:8001
  sleb-serve canary --dense http://a:8000 --pruned http://b:8000 --prompts prompts.jsonl \\
      --requests 200 --max-drift 0.3 --json

Exit code: 0 if both answered and the loss rose by no more than --max-drift, 1 if it rose by more, 2
if that could not be asked. Both servers are sent the key in VLLM_API_KEY, if it is set.
"""


def _add_probe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="the server's URL, e.g. http://localhost:8000")
    add_manifest(parser)
    add_blocks(parser)
    parser.add_argument(
        "--tolerance",
        metavar="NATS",
        type=float,
        default=TOLERANCE,
        help=f"allowed mean difference of the golden log-probabilities (default: {TOLERANCE})",
    )


def _probe(options: argparse.Namespace) -> int:
    _check_nats("--tolerance", options.tolerance)
    manifest = read_manifest(options.manifest, repairs=False).prefix(options.blocks)
    try:
        found = probe(Client(options.url, key=key_of_environment()), manifest, options.tolerance)
    except (NotReadyError, ServerError) as error:
        say(f"not ready: {error}")
        return 1
    tell(found.to_text())
    return 0


def _add_canary(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dense", metavar="URL", required=True)
    parser.add_argument("--pruned", metavar="URL", required=True)
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        type=Path,
        help="text file with one prompt per line, or JSON lines",
    )
    for name, value, text in (
        ("requests", 16, "number of prompts"),
        ("max-tokens", 64, "tokens per answer"),
        ("concurrency", CONCURRENCY, "concurrent prompts"),
    ):
        help_text = f"{text} (default: {value})"
        parser.add_argument(f"--{name}", metavar="N", type=int, default=value, help=help_text)
    parser.add_argument(
        "--max-drift", metavar="NATS", type=float, help="exit with 1 if the loss rises by more"
    )
    add_json(parser)


def _canary(options: argparse.Namespace) -> int:
    for name in ("requests", "max_tokens", "concurrency"):
        if getattr(options, name) < 1:
            raise SlebError(f"--{name.replace('_', '-')} must be at least 1")
    _check_nats("--max-drift", options.max_drift)
    prompts = read_prompts(options.prompts, options.requests)
    key = key_of_environment()
    dense, pruned = Client(options.dense, key=key), Client(options.pruned, key=key)
    with tqdm(total=len(prompts), unit="prompt", leave=False) as bar:
        drift = canary(
            dense, pruned, prompts, options.max_tokens, options.concurrency, lambda: bar.update()
        )
    tell(json.dumps(drift.to_dict(), indent=2) if options.json else drift.to_text())
    limit = options.max_drift
    if limit is not None and not drift.loss_drift <= limit:
        say(f"the loss rose by {drift.loss_drift:.4f} nats a token, more than {limit:g}")
        return 1
    return 0


def _check_nats(name: str, value: float | None) -> None:
    if value is not None and not math.isfinite(value):
        raise SlebError(f"{name} {value}: give a number of nats, as 0.1")


COMMANDS = (
    Command(
        "probe",
        "check that a server is ready and serves a manifest's model",
        _add_probe,
        _probe,
        _PROBE_EXAMPLES,
    ),
    Command(
        "canary",
        "compare a pruned server's answers with a dense one's",
        _add_canary,
        _canary,
        _CANARY_EXAMPLES,
    ),
)
