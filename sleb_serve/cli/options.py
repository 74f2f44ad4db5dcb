"""What the command line takes: commands, options, their help and examples."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from sleb_bench.options import BENCH_EXAMPLES, REPORT_EXAMPLES, add_bench, add_report
from sleb_serve import __version__
from sleb_serve.data.texts import EMBEDDED, HUB_TEXTS, JUDGED_TEXTS
from sleb_serve.errors import SlebError
from sleb_serve.evaluation.evaluate import PAPER_TASKS
from sleb_serve.manifest.pruning import REPAIRS
from sleb_serve.manifest.schema import OBJECTIVES
from sleb_serve.roofline.plan import GPUS
from sleb_serve.selection.pipeline import DTYPES, SEARCHES
from sleb_serve.serving.canary import CONCURRENCY
from sleb_serve.serving.probe import TOLERANCE

_SELECT_EXAMPLES = """\
examples:
  sleb-serve select meta-llama/Llama-2-70b-hf -o llama-70b.json --remove 0.2
  sleb-serve select facebook/opt-6.7b -o opt.json --remove 7 --calibration c4 --rows 128
  sleb-serve select ./my-model -o m.json --remove 6 --calibration chats.jsonl \\
      --sequences 16 --sequence-length 1024
  sleb-serve select ./my-model -o m.json --remove 6 --repair fold --repair-sequences 64
  sleb-serve select ./my-model -o m.json --remove 6 --search beam:4 --seeds 3
  sleb-serve select ./huge-model -o m.json --remove 0.2 --memory-budget 16GiB
  accelerate launch --num_processes 2 -m sleb_serve.cli select ./my-model -o m.json --remove 6
  sleb-serve select ./my-model -o m.json --remove 6 --resume    # after an interruption

Rows of a .jsonl, .jsonl.gz or .parquet file hold a text, or a chat, which the model's chat template
writes: {"text": …}, {"messages": [{"role": …, "content": …}]}, {"conversations": [{"from": …,
"value": …}]}, {"instruction": …, "input": …, "output": …} or {"prompt": …, "completion": …}.

Beside M.json, M.json.search.jsonl records every candidate of every step, and a repair's weights are
in M.json.repair.safetensors, which must lie beside M.json wherever it is served.
"""
_SERVE_EXAMPLES = """\
examples:
  sleb-serve serve meta-llama/Llama-2-70b-hf -m llama-70b.json --tensor-parallel-size 2
  sleb-serve serve ./my-model -m m.json --blocks 4 --port 8001 --max-model-len 4096
  sleb-serve serve ./my-model -m m.json --dry-run      # print the vLLM command, start nothing
  sleb-serve serve ./my-model -m m.json --as-draft     # the dense model, drafted for by the pruned

Every option that is not named here goes to vLLM as it is; see `vllm serve --help`.
The server refuses to start rather than serve the dense model.
"""
_CHECK_EXAMPLES = """\
examples:
  sleb-serve check m.json ./my-model
  sleb-serve check llama-2-70b.json meta-llama/Llama-2-70b-hf --gpu A100-80G --tp 2 --json

Needs no GPU and no vLLM. Exit code: 0 if nothing speaks against it, 1 if something does, 2 if it
could not be checked.
"""
_PROBE_EXAMPLES = """\
examples:
  sleb-serve probe http://localhost:8000 -m m.json
  sleb-serve probe http://localhost:8000 -m m.json --blocks 4

Asks every rank for its manifest, and the model for log-probabilities that `select` stored. Exit
code: 0 if it is ready, 1 if it is not, 2 if that could not be asked.
"""
_CANARY = """\
examples:
  sleb-serve canary --dense http://localhost:8000 --pruned http://localhost:8001
  sleb-serve canary --dense http://a:8000 --pruned http://b:8000 --prompts prompts.jsonl \\
      --requests 200 --max-drift 0.3 --json

Exit code: 0 if both answered and the loss rose by no more than --max-drift, 1 if it rose by more, 2
if that could not be asked.
"""
_EVAL_EXAMPLES = """\
examples:
  sleb-serve eval meta-llama/Llama-2-7b-hf -m m.json --perplexity wikitext2,c4
  sleb-serve eval ./my-model -m m.json --tasks            # the paper's five zero-shot tasks
  sleb-serve eval ./my-model -m m.json --blocks 0,2,4,6 --tasks piqa,gsm8k --limit 200 -o e.json
  sleb-serve eval ./my-model --removal-list '[5, 4, 9]' --perplexity chats.jsonl
  sleb-serve eval ./my-model -m m.json --backend vllm --engine-args '{"tensor_parallel_size": 2}'

With -o E.json, E.lm-eval-K.json holds lm-eval's own results for K blocks, E.png a picture where
several K were judged, and --resume goes on where an interrupted evaluation stopped.
"""
_EXPORT_EXAMPLES = """\
examples:
  sleb-serve export ./my-model -m m.json pruned-model     # for any Transformers or vLLM
  sleb-serve export ./my-model -m m.json --format mergekit merge.yaml
  llama-quantize --prune-layers $(sleb-serve export ./my-model -m m.json --format llama.cpp -) …
"""
_IMPORT_EXAMPLES = """\
examples:
  sleb-serve import sleb_results/sleb.txt facebook/opt-6.7b -o m.json    # its last run; or --run N
  sleb-serve import sleb.log facebook/opt-6.7b -o m.json    # the output of a killed sleb.py
  sleb-serve import '[5, 4, 9]' ./my-model -o m.json
  sleb-serve import merge.yaml ./my-model -o m.json                      # mergekit, passthrough
  sleb-serve import dropped/config.json ./my-model -o m.json             # LLM-Drop, whole blocks

Blocks keep the order of the source. What it says beyond whole blocks of one model (halves,
scaled weights, adapters, another number of blocks) is refused.
"""


class _Parser(argparse.ArgumentParser):
    """Argparse with errors of one line; the usage is a --help away."""

    def error(self, message: str) -> NoReturn:
        raise SlebError(f"{message}; see `{self.prog} --help`")


def parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The parser of the whole command line, and that of `serve`, whose other options are vLLM's."""
    parser = _Parser(
        prog="sleb-serve",
        description="Find the transformer blocks an LLM can lose, serve it without them in vLLM, "
        "measure the gain.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, examples: str | None = None) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    _add_select(command("select", "find the blocks to remove, write a manifest", _SELECT_EXAMPLES))
    show = command("show", "show what a manifest removes, and the loss curve")
    _add_manifest(show, positional=True)
    show.add_argument("--json", action="store_true", help="the manifest itself, validated")
    check = command(
        "check",
        "say whether a manifest can be served with a model, and what it saves",
        _CHECK_EXAMPLES,
    )
    _add_manifest(check, positional=True)
    check.add_argument("model", metavar="MODEL", help="checkpoint folder or hub id")
    _add_revision(check)
    check.add_argument("--gpu", metavar="NAME", help=f"{', '.join(GPUS)}: also its KV cache")
    check.add_argument("--tp", metavar="N", type=int, default=1, help="tensor parallelism (1)")
    check.add_argument("--json", action="store_true", help="for machines")
    serve = command("serve", "serve a pruned model with vLLM", _SERVE_EXAMPLES)
    serve.usage = (
        "%(prog)s MODEL -m M.json [--blocks K] [--as-draft] [--dry-run] [any option of vllm serve]"
    )
    _add_manifest(serve)
    serve.add_argument(
        "--dry-run", action="store_true", help="print the vLLM command, start nothing"
    )
    serve.add_argument(
        "--as-draft",
        action="store_true",
        help="serve the whole model, with the pruned one drafting for it: the dense model's output",
    )
    serve.add_argument(
        "--draft-tokens", metavar="N", type=int, default=3, help="tokens drafted at a time (3)"
    )
    _add_eval(
        command(
            "eval",
            "judge the pruned model: perplexity and lm-eval's tasks",
            _EVAL_EXAMPLES,
        )
    )
    probe = command("probe", "say whether a server serves a manifest as it should", _PROBE_EXAMPLES)
    probe.add_argument("url", metavar="URL", help="of the server, as http://localhost:8000")
    _add_only_manifest(probe)
    probe.add_argument(
        "--tolerance",
        metavar="NATS",
        type=float,
        default=TOLERANCE,
        help=f"how far golden log-probabilities may be off on average (default: {TOLERANCE})",
    )
    canary = command("canary", "compare a pruned server's answers with a dense one's", _CANARY)
    canary.add_argument("--dense", metavar="URL", required=True)
    canary.add_argument("--pruned", metavar="URL", required=True)
    canary.add_argument("--prompts", metavar="FILE", type=Path, help="a line each, or JSON lines")
    canary.add_argument("--requests", metavar="N", type=int, default=16, help="prompts (16)")
    canary.add_argument("--max-tokens", metavar="N", type=int, default=64, help="tokens each (64)")
    canary.add_argument(
        "--concurrency", metavar="N", type=int, default=CONCURRENCY, help="prompts at a time (4)"
    )
    canary.add_argument(
        "--max-drift", metavar="NATS", type=float, help="exit code 1 if the loss rises by more"
    )
    canary.add_argument("--json", action="store_true", help="for machines")
    export = command("export", "write a plain, physically pruned checkpoint", _EXPORT_EXAMPLES)
    export.add_argument("model", metavar="MODEL", help="checkpoint folder or hub id")
    _add_manifest(export)
    export.add_argument(
        "output",
        metavar="OUT",
        type=Path,
        help="the folder to make; for mergekit and llama.cpp a file, or - for standard output",
    )
    _add_revision(export)
    export.add_argument(
        "--for",
        dest="for_",
        choices=("any", "transformers"),
        default="any",
        help="who is to load it: any refuses what vLLM without sleb-serve would run otherwise than "
        "Transformers (default: any)",
    )
    export.add_argument(
        "--format",
        choices=("transformers", "mergekit", "llama.cpp"),
        default="transformers",
        help="a checkpoint, a mergekit configuration, or the value of llama-quantize's "
        "--prune-layers (default: transformers)",
    )
    importer = command(
        "import", "write a manifest from a list that another tool made", _IMPORT_EXAMPLES
    )
    importer.add_argument("source", metavar="SOURCE", help="a file, or the list itself")
    importer.add_argument("model", metavar="MODEL", help="checkpoint folder or hub id")
    _add_revision(importer)
    importer.add_argument("-o", "--output", metavar="M.json", type=Path, required=True)
    importer.add_argument(
        "--run", metavar="N", type=int, help="which of several runs in SLEB's results (the last)"
    )
    commands.add_parser(
        "lm-eval",
        help="lm-eval's own command line, with --model sleb, which takes manifest=M.json",
        add_help=False,
    )
    bench = command("bench", "measure the pruned model against the dense one", BENCH_EXAMPLES)
    bench.add_argument("model", metavar="MODEL", nargs="?", help="checkpoint folder or hub id")
    _add_removal(bench, required=False)
    _add_revision(bench)
    add_bench(bench)
    add_report(
        command("report", "make a benchmark's report again, or compare two", REPORT_EXAMPLES)
    )
    architectures = command(
        "architectures", "list which architectures can be served pruned, and why others cannot"
    )
    form = architectures.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="for machines")
    form.add_argument("--markdown", action="store_true", help="as a table for documents")
    return parser, serve


def _add_only_manifest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--manifest", metavar="M.json", type=Path, required=True)
    parser.add_argument("--blocks", metavar="K", type=int, help="how many removals are served")


def _add_manifest(parser: argparse.ArgumentParser, positional: bool = False) -> None:
    if positional:
        parser.add_argument("manifest", metavar="M.json", type=Path)
    else:
        _add_removal(parser, required=True)
    parser.add_argument(
        "--blocks", metavar="K", type=int, help="only the manifest's first K removals"
    )


def _add_removal(parser: argparse.ArgumentParser, required: bool) -> None:
    given = parser.add_mutually_exclusive_group(required=required)
    given.add_argument("-m", "--manifest", metavar="M.json", type=Path)
    given.add_argument(
        "--removal-list",
        "--removal_list",
        metavar="'[5, 4, 9]'",
        help="the blocks to remove, in order, in place of a manifest",
    )


def _add_revision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--revision",
        metavar="REV",
        help="branch, tag or commit of a hub model (default: the manifest's, or the main branch)",
    )


def _add_sequence_length(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sequence-length",
        metavar="L",
        type=int,
        help="tokens a window (default: 2048, or the model's context if that is shorter)",
    )


def _add_select(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or hub id")
    parser.add_argument("-o", "--output", metavar="M.json", type=Path, required=True)
    parser.add_argument(
        "--remove",
        metavar="N|SHARE",
        required=True,
        help="how many blocks to remove (6), or what share of them, rounded up (0.2)",
    )
    parser.add_argument(
        "--calibration",
        metavar="TEXT",
        default="wikitext2",
        help=f"{', '.join(HUB_TEXTS)}, {EMBEDDED} (needs no download), or a .txt, .jsonl, "
        ".jsonl.gz or .parquet file of texts or chats (default: wikitext2)",
    )
    parser.add_argument(
        "--sequences",
        metavar="N",
        type=int,
        help="windows of text (default: all that the rows give; 8 for files)",
    )
    _add_sequence_length(parser)
    parser.add_argument(
        "--rows",
        metavar="R",
        type=int,
        help="rows of wikitext2 or c4 (default: 128, or as many as --sequences needs)",
    )
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="shuffles the rows")
    parser.add_argument(
        "--early-barrier", metavar="B", type=int, default=1, help="first blocks that stay"
    )
    parser.add_argument(
        "--late-barrier", metavar="B", type=int, default=1, help="last blocks that stay"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="dtype to compute in (default: the checkpoint's; float32 for a 16-bit one on a CPU "
        "that would emulate it)",
    )
    parser.add_argument(
        "--search",
        metavar="|".join(SEARCHES),
        default="greedy",
        help="greedy: the official algorithm's result, exactly; fast: the same with a probability "
        "of 95 %%, candidates leave once they are unlikely to win; beam:W follows the W best sets "
        "of each size; swap exchanges blocks of the greedy choice while that lowers the loss "
        "(default: greedy)",
    )
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES,
        help="what to keep low: nll, the loss on the text, as the paper does; kl, the divergence "
        "from the dense model's predictions; embedding, the distance of the last hidden states "
        "(default: nll; for pooling models embedding)",
    )
    parser.add_argument(
        "--seeds",
        metavar="S",
        type=int,
        default=1,
        help="search on S samples of the text, and state in the manifest how stable the list is; "
        "the blocks removed are the first sample's (default: 1)",
    )
    parser.add_argument(
        "--repair",
        choices=("none", *REPAIRS),
        default="none",
        help="fit, in closed form, what stands in for the removed blocks: fold changes weights of "
        "the blocks before them and costs nothing to serve (default: none)",
    )
    parser.add_argument(
        "--repair-sequences",
        metavar="N",
        type=int,
        help="windows of text to fit the repair on, which is cheap beside the search: the more the "
        "better (default: those of the search)",
    )
    parser.add_argument(
        "--repair-search",
        metavar="N",
        type=int,
        default=0,
        help="choose each block among the N best by their loss once repaired (default: 0, by the "
        "loss as they are)",
    )
    parser.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="memory for weights, states and work, as 16GiB; a model that is larger is read layer "
        "by layer (default: 80 %% of what is free)",
    )
    _add_revision(parser)
    parser.add_argument(
        "--resume", action="store_true", help="take over the finished steps of a killed search"
    )
    parser.add_argument(
        "--metrics-port",
        metavar="PORT",
        type=int,
        help="show the progress to Prometheus at this port (0 for any that is free)",
    )


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or hub id")
    _add_removal(parser, required=False)
    _add_revision(parser)
    parser.add_argument(
        "--blocks",
        metavar="K,K…",
        help="how many of the manifest's removals; several for a frontier, 0 for the dense model "
        "(default: all of them)",
    )
    parser.add_argument(
        "--perplexity",
        metavar="TEXT,…",
        help=f"{', '.join(JUDGED_TEXTS)}, {EMBEDDED} or a file (default: wikitext2, unless --tasks "
        "are given)",
    )
    _add_sequence_length(parser)
    parser.add_argument(
        "--windows", metavar="N", type=int, help="only the first N windows of each text"
    )
    parser.add_argument(
        "--tasks",
        metavar="TASK,…",
        nargs="?",
        const=",".join(PAPER_TASKS),
        help=f"tasks of lm-eval by name (without names: {', '.join(PAPER_TASKS)})",
    )
    parser.add_argument("--limit", metavar="N", type=int, help="only N rows of each task")
    parser.add_argument("--num-fewshot", metavar="N", type=int, help="examples in the prompt")
    parser.add_argument(
        "--backend",
        choices=("hf", "vllm"),
        default="hf",
        help="Transformers, or the engine that will serve (default: hf)",
    )
    parser.add_argument(
        "--batch-size", metavar="N", default="1", help="lm-eval's, for hf: a number or auto (1)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="(default: the checkpoint's)"
    )
    parser.add_argument(
        "--engine-args",
        metavar="JSON",
        default="{}",
        help="arguments of lm-eval's vllm model and of vllm.LLM, for --backend vllm",
    )
    parser.add_argument("-o", "--output", metavar="E.json", type=Path, help="where results go")
    parser.add_argument("--resume", action="store_true", help="keep the results that are in E.json")
    parser.add_argument(
        "--write-back", action="store_true", help="also put the results into the manifest"
    )
    parser.add_argument("--json", action="store_true", help="print the report for machines")
