"""The options of ``sleb-serve bench`` and ``sleb-serve report``."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from sleb_bench.records import SERVING, SLO
from sleb_bench.run import BenchOptions
from sleb_bench.serving_options import PRUNED, ServingOptions
from sleb_bench.variants import BESIDE, DENSE
from sleb_bench.workloads import NAMES
from sleb_serve.errors import SlebError
from sleb_serve.utils.lists import numbers, words

BENCH_EXAMPLES = """\
examples:
  sleb-serve bench ./my-model -m m.json --blocks 3,6 -o results
  sleb-serve bench ./my-model -m m.json -o results --workloads official --beside transformers
  sleb-serve bench ./my-model -m m.json -o results --workloads serving --request-rates 1,2,4,inf
  sleb-serve bench ./my-model -m m.json -o results --workloads slo --slo ttft=450ms,tpot=40ms
  sleb-serve bench ./my-model -m m.json -o results --workloads serving \\
      --dense http://localhost:8000 --pruned http://localhost:8001
  sleb-serve bench ./my-model -m m.json -o results --beside export,dense    # cross-check
  sleb-serve bench ./my-model --removal-list '[5, 4, 9]' -o results \\
      --engine-args '{"tensor_parallel_size": 2}' --one-at-a-time

Writes DIR/records.jsonl (every raw sample), and from it report.md, report.json, report.html and
plots; `sleb-serve report DIR` rebuilds them.
"""
REPORT_EXAMPLES = """\
examples:
  sleb-serve report results                # from records.jsonl alone
  sleb-serve report before after           # exit code 1 if a ratio got worse
"""


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Add all options except MODEL, -m, --removal-list and --blocks, which other commands share."""
    default = BenchOptions("", Path())
    add = parser.add_argument
    add("-o", "--output", metavar="DIR", type=Path, required=True, help="output folder")
    add(
        "--workloads",
        metavar="NAME,…",
        type=words,
        default=default.workloads,
        help=f"of {', '.join((*NAMES, SERVING, SLO))} (default: {','.join(default.workloads)})",
    )
    add(
        "--beside",
        metavar="NAME,…",
        type=words,
        default=(),
        help=f"also measure: {', '.join(BESIDE)}; dense is a second dense engine, export the "
        "exported checkpoint in stock vLLM, capped the pruned model with the dense model's KV "
        "cache size, transformers Transformers' generate",
    )
    for name, text in (
        ("starts", "minimum starts of every engine, if there is time"),
        ("prompt_length", "tokens per prompt for prefill"),
        ("batch", "concurrent sequences in decode"),
        ("output_length", "generated tokens per sequence"),
        ("requests", "requests of the saturated workload"),
        ("perplexity_sequences", "sequences of held-out text for the perplexity"),
    ):
        value = getattr(default, name)
        flag = f"--{name.replace('_', '-')}"
        add(flag, type=int, metavar="N", default=value, help=f"{text} (default: {value})")
    for name, unit, text in (
        ("precision", "PERCENT", "measure until every ratio's interval is this narrow"),
        ("minutes", "M", "maximum time after the first engines' start; at least two rounds"),
    ):
        value = getattr(default, name)
        help_text = f"{text} (default: {value:g})"
        add(f"--{name}", type=float, metavar=unit, default=value, help=help_text)
    add(
        "--one-at-a-time",
        action="store_true",
        help="run one engine at a time, if two do not fit; takes many starts",
    )
    add("--profile", action="store_true", help="also write the time per operator")
    add(
        "--engine-args",
        metavar="JSON",
        default=default.engine_args,
        help='vllm.LLM arguments for all engines, e.g. {"enforce_eager": true}',
    )
    add(
        "--gpu-hour",
        metavar="PRICE",
        type=float,
        help="hourly price of one engine's hardware; adds the cost per million tokens",
    )
    _add_serving(parser.add_argument_group("serving"))


def _add_serving(group: Any) -> None:
    default = ServingOptions()
    group.add_argument(
        "--request-rates",
        metavar="R,R…",
        type=_rates,
        default=default.rates,
        help="request rates per second, or inf (default: a ladder up to the dense model's "
        "saturation)",
    )
    group.add_argument(
        "--concurrency",
        metavar="N,N…",
        type=numbers,
        default=default.concurrency,
        help="also measure with these limits on concurrent requests",
    )
    for name, text in (
        ("requests", "requests at each point"),
        ("input_length", "tokens per prompt"),
        ("output_length", "tokens per answer"),
        ("rounds", "rounds, after one warm-up round"),
    ):
        value = getattr(default, name)
        flag = f"--serving-{name.replace('_', '-')}"
        group.add_argument(
            flag, type=int, metavar="N", default=value, help=f"{text} (default: {value})"
        )
    slo = ",".join(f"{name}={limit:g}ms" for name, limit in default.slo.items())
    group.add_argument(
        "--slo",
        metavar="NAME=TIME,…",
        type=_slo,
        default=default.slo,
        help=f"limits that a request must meet to count for goodput; the workload {SLO} searches "
        f"for the highest rate within them (default: {slo})",
    )
    group.add_argument(
        "--dataset",
        metavar="FILE",
        type=Path,
        help="prompts from a ShareGPT file (.json), or from lines with a prompt (.jsonl)",
    )
    for name in (DENSE, PRUNED):
        text = f"URL of a running {name} server to benchmark instead of starting one"
        group.add_argument(f"--{name}", metavar="URL", help=text)


def add_report(parser: argparse.ArgumentParser) -> None:
    """Add one folder to report on, or two to compare."""
    parser.add_argument("folder", metavar="DIR", type=Path, help="output of `sleb-serve bench`")
    parser.add_argument("other", metavar="DIR2", type=Path, nargs="?", help="a later run")
    parser.add_argument("--json", action="store_true", help="print JSON")


def bench_options(options: argparse.Namespace) -> BenchOptions:
    """Build the benchmark's options from the command line."""
    serving = ServingOptions(
        rates=options.request_rates,
        concurrency=options.concurrency,
        requests=options.serving_requests,
        input_length=options.serving_input_length,
        output_length=options.serving_output_length,
        slo=options.slo,
        rounds=options.serving_rounds,
        dataset=options.dataset,
        urls={name: url for name in (DENSE, PRUNED) if (url := getattr(options, name))},
    )
    fields = BenchOptions.__dataclass_fields__.keys() - {"serving"}
    return BenchOptions(**{name: getattr(options, name) for name in fields}, serving=serving)


def _rates(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise SlebError(f"--request-rates {text}: give numbers or inf, as 1,2,inf") from None


def _slo(text: str) -> dict[str, float]:
    """Parse times such as 450ms or 2s into milliseconds by metric."""
    found = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s)", value)
        if match is None:
            raise SlebError(f"--slo {text}: give times in ms or s, as ttft=450ms,tpot=40ms")
        found[name] = float(match[1]) * (1000 if match[2] == "s" else 1)
    return found
