"""``sleb-serve show``, ``check``, ``plan`` and ``architectures``: answers without a GPU."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from sleb_serve.cli.arguments import (
    MODEL_HELP,
    Command,
    add_blocks,
    add_json,
    add_manifest,
    add_model,
    add_tensor_parallel,
)
from sleb_serve.cli.progress import tell
from sleb_serve.compat.architectures import support, support_markdown, support_text
from sleb_serve.errors import SlebError
from sleb_serve.evaluation.report import describe
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.roofline.device import device_here
from sleb_serve.roofline.plan import (
    GPUS,
    HERE,
    SHAPES,
    SPLITS,
    Gpu,
    default_removed,
    describe_plan,
    plan,
    read_shape,
)
from sleb_serve.serving.preflight import check
from sleb_serve.utils.lists import numbers

_CHECK_EXAMPLES = """\
examples:
  sleb-serve check ./my-model -m m.json
  sleb-serve check meta-llama/Llama-2-70b-hf -m llama-2-70b.json --gpu A100-80G -tp 2 --json

Needs no GPU and no vLLM. Exit code: 0 if nothing speaks against it, 1 if something does, 2 if it
could not be checked.
"""
_PLAN_EXAMPLES = """\
examples:
  sleb-serve plan --gpu A100-80G -tp 2                 # llama-2-70b, no GPU needed
  sleb-serve plan ./my-model --gpu H100-80G --removed 4,8
"""


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", metavar="M.json", type=Path)
    add_blocks(parser)
    parser.add_argument("--json", action="store_true", help="print the manifest, validated")


def _show(options: argparse.Namespace) -> int:
    manifest = read_manifest(options.manifest).prefix(options.blocks)
    tell(manifest.to_json().decode() if options.json else describe(manifest))
    return 0


def _add_check(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_manifest(parser)
    add_blocks(parser)
    parser.add_argument("--gpu", metavar="NAME", help=f"{', '.join(GPUS)}: also its KV cache")
    add_tensor_parallel(parser)
    add_json(parser)


def _check(options: argparse.Namespace) -> int:
    manifest = read_manifest(options.manifest).prefix(options.blocks)
    gpu = None if options.gpu is None else _gpu(options.gpu)
    report = check(options.model, manifest, gpu, options.tp, options.revision)
    if options.json:
        tell(json.dumps({"passed": report.passed, **asdict(report)}, indent=2))
    else:
        tell(report.to_text())
    return int(not report.passed)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default="llama-2-70b",
        help=f"{MODEL_HELP}, or one of {', '.join(SHAPES)} (default: llama-2-70b)",
    )
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        default="A100-80G",
        help=f"{', '.join(GPUS)}, or {HERE} to measure this machine's peaks (default: A100-80G)",
    )
    add_tensor_parallel(parser)
    parser.add_argument(
        "--split",
        choices=SPLITS,
        default=SPLITS[0],
        help="how GPUs share the model: every matrix, or its layers, one GPU after another, as "
        "Transformers does (default: tensor)",
    )
    parser.add_argument(
        "--removed", metavar="K,K…", type=numbers, help="blocks removed (default: 10, 20, 30 %%)"
    )
    for name, of in (("compute", "flop/s"), ("memory", "bandwidth")):
        parser.add_argument(
            f"--{name}-efficiency",
            metavar="X",
            type=float,
            default=1.0,
            help=f"part of the peak {of} that kernels reach (default: 1, the bound)",
        )
    add_json(parser)


def _plan(options: argparse.Namespace) -> int:
    shape = read_shape(options.model)
    for name in ("compute_efficiency", "memory_efficiency"):
        if not 0 < getattr(options, name) <= 1:
            raise SlebError(f"--{name.replace('_', '-')} is above 0 and at most 1")
    gpu = device_here() if options.gpu == HERE else _gpu(options.gpu)
    gpu = gpu.slowed(options.compute_efficiency, options.memory_efficiency)
    removed = options.removed or default_removed(shape)
    found, paper = plan(shape, gpu, options.tp, removed, options.split)
    if options.json:
        values = {
            "shape": asdict(shape),
            "gpu": asdict(gpu),
            "tp": options.tp,
            "split": options.split,
            "predictions": [asdict(prediction) for prediction in found],
            "paper": paper,
        }
        tell(json.dumps(values, indent=2))
    else:
        tell(describe_plan(shape, gpu, options.tp, found, paper, options.split))
    return 0


def _gpu(name: str) -> Gpu:
    if name not in GPUS:
        raise SlebError(f"--gpu {name} is not one of {', '.join(GPUS)}")
    return GPUS[name]


def _add_architectures(parser: argparse.ArgumentParser) -> None:
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON for machines")
    form.add_argument("--markdown", action="store_true", help="as a table for documents")


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
        "plan",
        "predict the gain on a GPU that is not at hand, from a model's config",
        _add_plan,
        _plan,
        _PLAN_EXAMPLES,
    ),
    Command(
        "architectures",
        "list the architectures that can be served pruned, and why others cannot",
        _add_architectures,
        _architectures,
    ),
)
