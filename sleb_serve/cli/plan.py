"""``sleb-serve plan``: predict the gain on GPUs that you do not have, and how many you need."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sleb_serve.cli.arguments import MODEL_HELP, Command, add_json, add_tensor_parallel
from sleb_serve.cli.progress import tell
from sleb_serve.errors import SlebError
from sleb_serve.roofline.device import device_here
from sleb_serve.roofline.fleet import (
    METRICS,
    Load,
    Need,
    Replica,
    Slo,
    describe_fleet,
    need,
    roofline_replica,
)
from sleb_serve.roofline.gpu import GPUS, HERE, Gpu, gpu_named
from sleb_serve.roofline.measured import read_measured
from sleb_serve.roofline.model import MODELS, Model
from sleb_serve.roofline.plan import (
    about_model,
    bounds,
    check_plan,
    default_removed,
    describe_plan,
    plan,
)
from sleb_serve.roofline.simulation import Limits
from sleb_serve.roofline.sizes import read_model
from sleb_serve.roofline.step import SPLITS
from sleb_serve.utils.lists import numbers

_EXAMPLES = """\
examples:
  sleb-serve plan --gpu A100-80G -tp 2                 # llama-2-70b, no GPU needed
  sleb-serve plan ./my-model --gpu H100-80G --removed 4,8
  sleb-serve plan llama-3-8b --gpu H100-80G --rate 20 --slo ttft=450ms,tpot=40ms
  sleb-serve plan --measured results --rate 20 --slo ttft=450ms,tpot=40ms
"""
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s)\Z")
_MAX_TOKENS, _MAX_SEQUENCES = 8192, 256
"""vLLM's own defaults for a server on a large GPU."""


def _slo(text: str) -> Mapping[str, float]:
    """Seconds by metric from ``ttft=450ms,tpot=40ms``."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, limit = part.partition("=")
        match = _DURATION.match(limit)
        if name not in METRICS or name in found or match is None or not float(match[1]):
            raise argparse.ArgumentTypeError(
                f"{text}: give limits for {', '.join(METRICS)}, as ttft=450ms,tpot=40ms"
            )
        found[name] = float(match[1]) / (1000 if match[2] == "ms" else 1)
    return found


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help=f"{MODEL_HELP}, a config.json, or one of {', '.join(MODELS)} (default: llama-2-70b)",
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
        help="how GPUs share the model: tensor splits every matrix; layers assigns whole layers "
        "to GPUs that work one after another, as in Transformers (default: tensor)",
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
            help=f"share of the peak {of} that kernels reach (default: 1, the bound)",
        )
    _add_fleet(parser)
    add_json(parser)


def _add_fleet(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "how many replicas", "Simulates vLLM's continuous batching under Poisson arrivals."
    )
    group.add_argument("--rate", metavar="R", type=float, help="requests/s over all replicas")
    group.add_argument(
        "--slo",
        metavar="NAME=TIME,…",
        type=_slo,
        help=f"time limits for a request, e.g. ttft=450ms,tpot=40ms; of {', '.join(METRICS)}",
    )
    for option, default, text in (
        ("--attainment", 0.99, "share of the requests that must meet the SLO"),
        ("--range-ratio", 0.0, "lengths are uniform within this fraction of their average"),
    ):
        group.add_argument(
            option, metavar="X", type=float, default=default, help=f"{text} (default: {default})"
        )
    for option, default, text in (
        ("--input-length", 512, "average tokens per prompt"),
        ("--output-length", 128, "average tokens per answer"),
        ("--seed", 0, "seed for arrivals and lengths"),
    ):
        group.add_argument(
            option, metavar="N", type=int, default=default, help=f"{text} (default: {default})"
        )
    for option, text in (
        ("--max-num-batched-tokens", f"new tokens per step (default: {_MAX_TOKENS}"),
        ("--max-num-seqs", f"concurrent requests (default: {_MAX_SEQUENCES}"),
    ):
        group.add_argument(
            option, metavar="N", type=int, help=f"as in vLLM: {text}, or as measured)"
        )
    group.add_argument(
        "--measured",
        metavar="DIR",
        type=Path,
        action="append",
        help="use the step times that `sleb-serve bench` measured on one replica; repeat the "
        "option for runs with other --batch or --prompt-length",
    )


def _run(options: argparse.Namespace) -> int:
    if (options.rate is None) != (options.slo is None):
        raise SlebError("--rate and --slo belong together; give both, or neither")
    # Validate these options even if they are unused.
    _load(options)
    if options.measured:
        return _run_measured(options)
    model = read_model(options.model or "llama-2-70b")
    for name in ("compute_efficiency", "memory_efficiency"):
        if not 0 < getattr(options, name) <= 1:
            raise SlebError(f"--{name.replace('_', '-')} is above 0 and at most 1")
    gpu = device_here() if options.gpu == HERE else gpu_named(options.gpu)
    gpu = gpu.slowed(options.compute_efficiency, options.memory_efficiency)
    removed = options.removed or default_removed(model)
    if options.rate is not None:
        return _print_fleet(
            options,
            _by_roofline(options, model, gpu, removed),
            f"{bounds(model, gpu, options.tp, options.split)}, step times by the roofline",
        )
    found, paper = plan(model, gpu, options.tp, removed, options.split)
    if options.json:
        values = {
            "model": about_model(model),
            "gpu": asdict(gpu),
            "tp": options.tp,
            "split": options.split,
            "predictions": [asdict(prediction) for prediction in found],
            "paper": paper,
        }
        tell(json.dumps(values, indent=2))
    else:
        tell(describe_plan(model, gpu, options.tp, found, paper, options.split))
    return 0


def _load(options: argparse.Namespace) -> tuple[Load, Slo]:
    load = Load(
        1.0 if options.rate is None else options.rate,
        options.input_length,
        options.output_length,
        options.range_ratio,
        seed=options.seed,
    )
    load.check()
    if not 0 < options.attainment <= 1:
        raise SlebError("--attainment is above 0 and at most 1")
    return load, Slo(options.slo or {}, options.attainment)


def _by_roofline(
    options: argparse.Namespace, model: Model, gpu: Gpu, removed: Sequence[int]
) -> list[Need]:
    load, slo = _load(options)
    check_plan(model, options.tp, removed)
    tokens = options.max_num_batched_tokens or _MAX_TOKENS
    needs = []
    for count in dict.fromkeys((0, *removed)):
        replica = roofline_replica(
            model,
            gpu,
            options.tp,
            count,
            load,
            max_tokens=tokens,
            max_sequences=options.max_num_seqs or min(_MAX_SEQUENCES, tokens),
            split=options.split,
        )
        needs.append(
            Need(count, None, None, 0.0, None) if replica is None else need(replica, load, slo)
        )
    return needs


def _run_measured(options: argparse.Namespace) -> int:
    """Plan from records, which define the prunings, the machine and the KV cache."""
    if options.rate is None:
        raise SlebError("--measured is for --rate and --slo; give them, or leave it out")
    if options.model is not None or options.removed:
        raise SlebError("--measured takes the model and the blocks removed from its records alone")
    load, slo = _load(options)
    needs, notes = [], []
    for found in read_measured(options.measured):
        limits = Limits(
            options.max_num_batched_tokens or found.max_tokens,
            options.max_num_seqs or found.max_sequences,
            found.kv_tokens,
            found.block / 2,  # the last block of a request is half full on average
            1,
        )
        needs.append(need(Replica(found.removed, options.tp, limits, found.step), load, slo))
        notes.append(f"{found.name} to {found.loads} loads, off by up to {100 * found.error:.0f} %")
    return _print_fleet(options, needs, f"step times as measured, fitted: {'; '.join(notes)}")


def _print_fleet(options: argparse.Namespace, needs: Sequence[Need], heading: str) -> int:
    load, slo = _load(options)
    if options.json:
        values: dict[str, Any] = {
            "load": asdict(load),
            "slo": {"limits": dict(slo.limits), "attainment": slo.attainment},
            "step_times": heading,
            "needs": [asdict(found) for found in needs],
        }
        tell(json.dumps(values, indent=2))
    else:
        tell(describe_fleet(needs, load, slo, heading))
    return 0


COMMANDS = (
    Command(
        "plan",
        "predict the gain on GPUs that you do not have, and how many a load needs",
        _add,
        _run,
        _EXAMPLES,
    ),
)
