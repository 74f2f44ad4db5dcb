"""``sleb-serve export``, ``sleb-serve import`` and ``sleb-serve rebind``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from sleb_serve.checkpoint.hub import download_weights, open_checkpoint
from sleb_serve.cli.arguments import (
    MANIFEST_HELP,
    Command,
    add_blocks,
    add_force,
    add_model,
    add_removal,
)
from sleb_serve.cli.progress import ReadBar, ShardBar, say, tell
from sleb_serve.cli.removal import manifest_of_options
from sleb_serve.convert.export import export
from sleb_serve.convert.lists import LAYER_LIST, imported, llama_cpp_list
from sleb_serve.convert.mergekit import MERGEKIT, mergekit_config
from sleb_serve.convert.rebind import rebind
from sleb_serve.cut.servable import check_countable, check_servable
from sleb_serve.errors import SlebError
from sleb_serve.evaluation.report import describe
from sleb_serve.manifest.binding import check_model, revision_of
from sleb_serve.manifest.reader import MANIFEST, read_manifest
from sleb_serve.manifest.schema import Manifest
from sleb_serve.utils.atomic_io import write_atomically
from sleb_serve.utils.outputs import claimed
from sleb_serve.utils.sizes import format_size

_EXPORT_EXAMPLES = """\
examples:
  sleb-serve export ./my-model -m m.json -o pruned-model     # for any Transformers or vLLM
  sleb-serve export ./my-model -m m.json --format mergekit -o merge.yaml
  llama-quantize --prune-layers $(sleb-serve export ./my-model -m m.json --format llama.cpp -o -) …
"""
_IMPORT_EXAMPLES = """\
examples:
  sleb-serve import facebook/opt-6.7b sleb_results/sleb.txt -o m.json    # its last run; or --run N
  sleb-serve import facebook/opt-6.7b sleb.log -o m.json    # the output of a killed sleb.py
  sleb-serve import ./my-model '[5, 4, 9]' -o m.json
  sleb-serve import ./my-model merge.yaml -o m.json                      # mergekit, passthrough
  sleb-serve import ./my-model dropped/config.json -o m.json             # LLM-Drop, whole blocks

Blocks keep the order of the source. Sources with more than whole blocks of one model (half blocks,
scaled weights, adapters, a different number of blocks) are refused.
"""
_REBIND_EXAMPLES = """\
examples:
  sleb-serve rebind m.json ./my-model-FP8 -o fp8.json --origin ./my-model
  sleb-serve rebind llama-70b.json org/Llama-2-70b-FP8 -o fp8.json

Architecture, layers and tensors must match the manifest's own model; a mismatch is refused by name.
The losses remain those of the original model. Repairs do not carry over.
"""


def _add_export(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_removal(parser, required=True)
    add_blocks(parser)
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        type=Path,
        required=True,
        help="the folder to create; for mergekit and llama.cpp a file, or - for standard output",
    )
    parser.add_argument(
        "--for",
        dest="for_",
        choices=("any", "transformers"),
        default="any",
        help="who loads it: any refuses models that stock vLLM would run differently from "
        "Transformers (default: any)",
    )
    parser.add_argument(
        "--format",
        choices=("transformers", "mergekit", "llama.cpp"),
        default="transformers",
        help="a checkpoint, a mergekit configuration, or the value of llama-quantize's "
        "--prune-layers (default: transformers)",
    )
    add_force(parser)


def _export(options: argparse.Namespace) -> int:
    manifest = manifest_of_options(options).prefix(options.blocks)
    if options.format != "transformers":
        return _write_list(options, manifest)
    with ShardBar() as bar:
        done = export(
            options.model,
            manifest,
            options.output,
            revision=options.revision,
            for_vllm=options.for_ == "any",
            on_shard=bar.shard_done,
        )
    tell(
        f"wrote {done.folder}: {done.blocks} blocks, {format_size(done.size)} in {done.shards} "
        f"files (dense {format_size(done.source_size)})"
    )
    return 0


def _write_list(options: argparse.Namespace, manifest: Manifest) -> int:
    """Write the list of blocks for another tool."""
    revision = revision_of(options.model, manifest, options.revision)
    pruning = manifest.pruning()
    checkpoint = check_model(options.model, pruning, revision, servable=False, fetch=True)
    if manifest.repair is not None:
        raise SlebError(
            f"--format {options.format} only names blocks, and this manifest has a repair; "
            f"export it as a checkpoint, or select without --repair"
        )
    check_countable(checkpoint, pruning.cut)
    text = llama_cpp_list(manifest) + "\n"
    if options.format == "mergekit":
        text = mergekit_config(options.model, manifest, checkpoint.dtype)
    if str(options.output) == "-":
        tell(text.removesuffix("\n"))
    else:
        kind = MERGEKIT if options.format == "mergekit" else LAYER_LIST
        with claimed([(options.output, kind)], force=options.force):
            write_atomically(options.output, text.encode())
    return 0


def _add_import(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("source", metavar="SOURCE", help="a file, or the list itself")
    parser.add_argument("-o", "--output", metavar="M.json", type=Path, required=True)
    parser.add_argument(
        "--run",
        metavar="N",
        type=int,
        help="which of several runs in SLEB's results (default: the last)",
    )
    add_force(parser)


def _import(options: argparse.Namespace) -> int:
    with claimed([(options.output, MANIFEST)], force=options.force):
        download_weights(options.model, options.revision)
        checkpoint = open_checkpoint(options.model, options.revision)
        manifest = imported(options.source, options.model, checkpoint, options.run)
        check_servable(checkpoint, manifest.pruning().cut)
        with ReadBar() as bar:
            full = checkpoint.full_sha256(reading=bar.reading)
        manifest = replace(manifest, model=replace(manifest.model, full_sha256=full))
        manifest.write(options.output)
    tell(describe(manifest))
    return 0


def _add_rebind(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", metavar="M.json", help=MANIFEST_HELP)
    add_model(parser)
    parser.add_argument("-o", "--output", metavar="M2.json", type=Path, required=True)
    parser.add_argument(
        "--origin",
        metavar="MODEL",
        help="the manifest's own model, to compare with (default: its hub id)",
    )
    parser.add_argument(
        "--drop-repair",
        action="store_true",
        help="drop the repair, which does not carry over, instead of refusing",
    )
    add_force(parser)


def _rebind(options: argparse.Namespace) -> int:
    manifest = read_manifest(options.manifest, repairs=False)
    with ReadBar() as bar:
        manifest = rebind(
            manifest,
            options.model,
            options.output,
            revision=options.revision,
            origin=options.origin,
            drop_repair=options.drop_repair,
            force=options.force,
            note=say,
            reading=bar.reading,
        )
    tell(describe(manifest))
    tell(f"\nwrote {options.output}; its quality was not measured on this model")
    return 0


COMMANDS = (
    Command(
        "export",
        "write a plain, physically pruned checkpoint",
        _add_export,
        _export,
        _EXPORT_EXAMPLES,
    ),
    Command(
        "import",
        "write a manifest from another tool's list",
        _add_import,
        _import,
        _IMPORT_EXAMPLES,
    ),
    Command(
        "rebind",
        "bind a manifest to a quantised or fine-tuned version of its model",
        _add_rebind,
        _rebind,
        _REBIND_EXAMPLES,
    ),
)
