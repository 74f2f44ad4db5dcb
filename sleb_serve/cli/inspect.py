"""``sleb-serve show``, ``check`` and ``architectures``: answers without a GPU."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict

from sleb_serve.cli.arguments import (
    MANIFEST_HELP,
    Command,
    add_blocks,
    add_json,
    add_manifest,
    add_model,
    add_tensor_parallel,
)
from sleb_serve.cli.progress import ReadBar, tell
from sleb_serve.compat.architectures import support, support_markdown, support_text
from sleb_serve.evaluation.report import describe
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.roofline.gpu import GPUS, gpu_named
from sleb_serve.serving.cluster import check_nodes
from sleb_serve.serving.preflight import CheckReport, check

_CHECK_EXAMPLES = """\
examples:
  sleb-serve check ./my-model -m m.json
  sleb-serve check ./my-model -m m.json --full    # every byte of the weights
  sleb-serve check meta-llama/Llama-2-70b-hf -m llama-2-70b.json --gpu A100-80G -tp 2 --json
  sleb-serve check meta-llama/Llama-2-70b-hf -m llama-2-70b.json --cluster

Needs no GPU and no vLLM. Exit code: 0 if all checks pass, 1 if one fails, 2 if they could not run.
"""


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", metavar="M.json", help=MANIFEST_HELP)
    add_blocks(parser)
    parser.add_argument("--json", action="store_true", help="validate and print the manifest")


def _show(options: argparse.Namespace) -> int:
    manifest = read_manifest(options.manifest, repairs=False).prefix(options.blocks)
    tell(manifest.to_json().decode() if options.json else describe(manifest))
    return 0


def _add_check(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_manifest(parser)
    add_blocks(parser)
    parser.add_argument(
        "--full",
        action="store_true",
        help="read all of the weights, removed blocks' too, and compare the full digest",
    )
    parser.add_argument(
        "--cluster",
        action="store_true",
        help="check every node of the Ray cluster that this machine belongs to",
    )
    parser.add_argument("--gpu", metavar="NAME", help=f"{', '.join(GPUS)}: also its KV cache")
    add_tensor_parallel(parser)
    add_json(parser)


def _check(options: argparse.Namespace) -> int:
    manifest = read_manifest(options.manifest).prefix(options.blocks)
    gpu = None if options.gpu is None else gpu_named(options.gpu)
    asked = (options.model, manifest, gpu, options.tp, options.revision)
    if options.cluster:
        return _report_nodes(check_nodes(*asked, full=options.full), options.json)
    with ReadBar() as bar:
        report = check(*asked, full=options.full, reading=bar.reading)
    if options.json:
        tell(json.dumps({"passed": report.passed, **asdict(report)}, indent=2))
    else:
        tell(report.to_text())
    return int(not report.passed)


def _report_nodes(reports: Mapping[str, CheckReport], as_json: bool) -> int:
    passed = all(report.passed for report in reports.values())
    if as_json:
        nodes = {
            name: {"passed": report.passed, **asdict(report)} for name, report in reports.items()
        }
        tell(json.dumps({"passed": passed, "nodes": nodes}, indent=2))
    else:
        tell("\n\n".join(f"{name}\n{report.to_text()}" for name, report in reports.items()))
    return int(not passed)


def _add_architectures(parser: argparse.ArgumentParser) -> None:
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")


def _architectures(options: argparse.Namespace) -> int:
    if options.json:
        tell(json.dumps(support(), indent=2))
    else:
        tell(support_markdown() if options.markdown else support_text())
    return 0


COMMANDS = (
    Command(
        "show", "show the blocks that a manifest removes, and the loss curve", _add_show, _show
    ),
    Command(
        "check",
        "check that a manifest can be served with a model, and show the memory it saves",
        _add_check,
        _check,
        _CHECK_EXAMPLES,
    ),
    Command(
        "architectures",
        "list the architectures that can be served pruned, and why others cannot",
        _add_architectures,
        _architectures,
    ),
)
