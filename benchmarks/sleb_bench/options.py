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
  sleb-serve bench ./my-model -m m.json -o results --beside export,dense    # is it all we think?
  sleb-serve bench ./my-model --removal-list '[5, 4, 9]' -o results \\
      --engine-args '{"tensor_parallel_size": 2}' --one-at-a-time

Writes DIR/records.jsonl (every raw sample), and from it report.md, report.json, report.html and
pictures; `sleb-serve report DIR` makes them again.
"""
REPORT_EXAMPLES = """\
examples:
  sleb-serve report results                # from records.jsonl alone
  sleb-serve report before after           # exit code 1 if a ratio got worse
"""


def add_bench(parser: argparse.ArgumentParser) -> None:
    """All but MODEL, -m, --removal-list and --blocks, which other commands have, too."""
    default = BenchOptions("", Path())
    add = parser.add_argument
    add("-o", "--output", metavar="DIR", type=Path, required=True, help="for records and report")
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
        "exported checkpoint in stock vLLM, capped the pruned model with no more KV cache than the "
        "dense, transformers its own generate",
    )
    for name, text in (
        ("starts", "times that every engine is started, at least, while there is time"),
        ("prompt_length", "tokens a prompt for prefill"),
        ("batch", "sequences generated at once in decode"),
        ("output_length", "tokens generated each"),
        ("requests", "requests of the saturated workload"),
        ("perplexity_sequences", "sequences of held-out text for the perplexity beside the speed"),
    ):
        value = getattr(default, name)
        flag = f"--{name.replace('_', '-')}"
        add(flag, type=int, metavar="N", default=value, help=f"{text} (default: {value})")
    for name, unit, text in (
        ("precision", "PERCENT", "measure until every ratio's interval reaches no further"),
        ("minutes", "M", "but no longer than this, from when the first engines are ready"),
    ):
        value = getattr(default, name)
        help_text = f"{text} (default: {value:g})"
        add(f"--{name}", type=float, metavar=unit, default=value, help=help_text)
    add(
        "--one-at-a-time",
        action="store_true",
        help="one engine at a time, for models of which two do not fit; takes many starts",
    )
    add("--profile", action="store_true", help="also write where the time goes, by operator")
    add(
        "--engine-args",
        metavar="JSON",
        default=default.engine_args,
        help='arguments of vllm.LLM for all, as {"enforce_eager": true}',
    )
    add(
        "--gpu-hour",
        metavar="PRICE",
        type=float,
        help="price per hour of what one engine runs on: also report cost per million tokens",
    )
    _add_serving(parser.add_argument_group("serving"))


def _add_serving(group: Any) -> None:
    default = ServingOptions()
    group.add_argument(
        "--request-rates",
        metavar="R,R…",
        type=_rates,
        default=default.rates,
        help="requests/s offered, or inf (default: a ladder up to what the dense model takes)",
    )
    group.add_argument(
        "--concurrency",
        metavar="N,N…",
        type=numbers,
        default=default.concurrency,
        help="also so many requests in flight at most",
    )
    for name, text in (
        ("requests", "requests at each point"),
        ("input_length", "tokens a prompt"),
        ("output_length", "tokens an answer"),
        ("rounds", "rounds, after one to warm up"),
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
        help=f"what a request must meet to count for goodput, and what the workload {SLO} searches "
        f"the highest rate for (default: {slo})",
    )
    group.add_argument(
        "--dataset",
        metavar="FILE",
        type=Path,
        help="prompts of a ShareGPT file (.json), or of lines with a prompt each (.jsonl)",
    )
    for name in (DENSE, PRUNED):
        text = f"address of a {name} server that runs already, to be loaded in place of our own"
        group.add_argument(f"--{name}", metavar="URL", help=text)


def add_report(parser: argparse.ArgumentParser) -> None:
    """One folder to report on, or two to compare."""
    parser.add_argument("folder", metavar="DIR", type=Path, help="what `sleb-serve bench` wrote")
    parser.add_argument("other", metavar="DIR2", type=Path, nargs="?", help="a later run")
    parser.add_argument("--json", action="store_true", help="for machines")


def bench_options(options: argparse.Namespace) -> BenchOptions:
    """What to measure, of the command line."""
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
    """Milliseconds by metric, of times as 450ms or 2s."""
    found = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s)", value)
        if match is None:
            raise SlebError(f"--slo {text}: give times in ms or s, as ttft=450ms,tpot=40ms")
        found[name] = float(match[1]) * (1000 if match[2] == "s" else 1)
    return found
