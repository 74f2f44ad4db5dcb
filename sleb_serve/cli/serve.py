"""``sleb-serve serve``: replace this process with vLLM's server."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Sequence

from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.cli.arguments import add_blocks, add_removal
from sleb_serve.cli.progress import say
from sleb_serve.cli.removal import manifest_of_options
from sleb_serve.cut.servable import check_servable
from sleb_serve.errors import SlebError
from sleb_serve.manifest.binding import revision_of
from sleb_serve.serving.command import (
    VERIFY,
    check_plugin,
    plugin_environment,
    server_command,
    with_draft,
    with_manifest,
)
from sleb_serve.serving.formats import FORMATS, by_name, platform_yaml, vllm_config
from sleb_serve.serving.options import value_of

HELP = "serve a pruned model with vLLM"
USAGE = "%(prog)s MODEL -m M.json [--blocks K] [--as-draft] [--dry-run [--format F]] [vLLM options]"
EXAMPLES = """\
examples:
  sleb-serve serve meta-llama/Llama-2-70b-hf -m llama-70b.json --tensor-parallel-size 2
  sleb-serve serve ./my-model -m m.json --blocks 4 --port 8001 --max-model-len 4096
  sleb-serve serve ./my-model -m m.json --dry-run      # print the vLLM command, start nothing
  sleb-serve serve meta-llama/Llama-2-70b-hf -m org/llama-70b-sleb16    # a manifest on the hub
  sleb-serve serve ./my-model -m m.json --dry-run --format vllm-config >serve.yaml
  sleb-serve serve ./my-model -m m.json --sleb-verify full   # compare all bytes of the weights
  sleb-serve serve ./my-model -m m.json --as-draft     # the dense model, drafted for by the pruned

Other options are passed to vLLM unchanged; see vllm serve --help.
The server refuses to start rather than serve the dense model.
"""


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options; all others are vLLM's."""
    parser.usage = USAGE
    add_removal(parser, required=True)
    add_blocks(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the vLLM command, start nothing"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="output of --dry-run: a shell command, JSON, a file for vLLM's --config, or YAML "
        "for Ray Serve LLM and KServe (default: shell)",
    )
    parser.add_argument(
        "--as-draft",
        action="store_true",
        help="serve the dense model, with the pruned one as its draft model",
    )
    parser.add_argument(
        "--draft-tokens", metavar="N", type=int, default=3, help="tokens per draft (default: 3)"
    )
    parser.add_argument(
        "--sleb-verify",
        choices=VERIFY,
        default=VERIFY[0],
        help="the digest of the weights that the server compares with the manifest's at its start: "
        "quick samples them, full reads all bytes of the blocks that stay (default: quick)",
    )


def _quoted(word: str) -> str:
    """Quote a word for a shell, with escapes that are safe to print in a terminal."""
    if word.isprintable():
        return shlex.quote(word)
    plain = word.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in plain) + "'"


def run_serve(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Print the command, and execute it unless --dry-run is given."""
    if set(arguments) & {"-h", "--help"}:
        parser.parse_args(["--help"])
    model = next(iter(arguments), "-")
    if model.startswith("-"):
        raise SlebError("name the model right after `serve`, as vllm serve does")
    options, rest = parser.parse_known_args(arguments[1:])
    options.revision = value_of(rest, "--revision")
    manifest = manifest_of_options(options, model).prefix(options.blocks)
    if options.format is not None and not options.dry_run:
        raise SlebError("--format needs --dry-run: give both, or neither")
    if options.as_draft:
        if options.sleb_verify == "full":
            raise SlebError(
                "--as-draft serves the whole model, which --sleb-verify full does not compare; run "
                "`sleb-serve check --full` before, and leave --sleb-verify out"
            )
        rest = with_draft(model, manifest, rest, options.draft_tokens)
    else:
        rest = with_manifest(model, manifest, rest, options.sleb_verify)
    pruning = manifest.pruning()
    if options.dry_run:
        revision = revision_of(model, manifest, options.revision)
        check_servable(open_checkpoint(model, revision), pruning.cut)
    else:
        check_plugin()
    text = _formatted(options.format or FORMATS[0], model, rest)
    role = "draft for the whole model" if options.as_draft else "served"
    source = "" if manifest.source is None else f", by {manifest.source}"
    kept = f"{pruning.num_kept} of {pruning.num_blocks} blocks of {model}"
    say(f"{pruning.tag}: {kept}, {role}{source}")
    print(text, flush=True)
    environment = plugin_environment()
    if options.dry_run:
        for name, value in environment.items():
            say(f"for GET /sleb/manifest and its metrics, set {name}={value}")
        return 0
    os.environ.update(environment)
    command = server_command(model, rest)
    try:
        # Replace this process, so that signals and the exit code are vLLM's own.
        os.execvp(command[0], command)
    except OSError as error:
        raise SlebError(
            f"cannot start {command[0]}: {error.strerror}; is vLLM installed?"
        ) from error


def _formatted(form: str, model: str, options: Sequence[str]) -> str:
    command, environment = server_command(model, options), plugin_environment()
    if form == "json":
        values = {
            "command": command,
            "environment": environment,
            "model": model,
            "arguments": by_name(options),
        }
        return json.dumps(values, indent=2)
    if form == "vllm-config":
        return vllm_config(model, options, environment).rstrip()
    if form == "yaml":
        return platform_yaml(model, options, environment, say).rstrip()
    return shlex.join(command)
