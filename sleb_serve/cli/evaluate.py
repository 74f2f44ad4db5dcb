"""``sleb-serve eval``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from sleb_serve.cli.arguments import (
    Command,
    add_counts,
    add_force,
    add_json,
    add_model,
    add_removal,
    add_sequence_length,
)
from sleb_serve.cli.progress import EvalLines, say, tell
from sleb_serve.cli.removal import manifest_of_options
from sleb_serve.data.texts import EMBEDDED, JUDGED_TEXTS
from sleb_serve.errors import SlebError
from sleb_serve.evaluation.evaluate import PAPER_TASKS, EvalConfig, evaluate, with_evaluation
from sleb_serve.evaluation.picture import PICTURE, draw
from sleb_serve.evaluation.report import evaluation_table
from sleb_serve.manifest.schema import Manifest
from sleb_serve.selection.config import DTYPES
from sleb_serve.utils import strict_json
from sleb_serve.utils.atomic_io import check_writable, is_stream
from sleb_serve.utils.extras import require
from sleb_serve.utils.lists import words
from sleb_serve.utils.outputs import Output, claimed

_EXAMPLES = """\
examples:
  sleb-serve eval meta-llama/Llama-2-7b-hf -m m.json --perplexity wikitext2,c4
  sleb-serve eval ./my-model -m m.json --tasks            # the paper's five zero-shot tasks
  sleb-serve eval ./my-model -m m.json --blocks 0,2,4,6 --tasks piqa,gsm8k --limit 200 -o e.json
  sleb-serve eval ./my-model --removal-list '[5, 4, 9]' --perplexity chats.jsonl
  sleb-serve eval ./my-model -m m.json --backend vllm --engine-args '{"tensor_parallel_size": 2}'

With -o E.json, E.lm-eval-K.json holds lm-eval's own results for K blocks, E.png a plot for several
K, and --resume continues an interrupted evaluation.
"""


def _add(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_removal(parser, required=False)
    add_counts(
        parser,
        "how many of the manifest's removals to apply; several for a frontier, 0 for the dense "
        "model (default: all)",
    )
    _add_measures(parser.add_argument_group("what to measure"))
    parser.add_argument(
        "--backend",
        choices=("hf", "vllm"),
        default="hf",
        help="Transformers, or the serving engine (default: hf)",
    )
    parser.add_argument(
        "--batch-size",
        metavar="N",
        default="1",
        help="lm-eval's batch size for hf: a number or auto (default: 1)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="compute dtype (default: the checkpoint's)"
    )
    parser.add_argument(
        "--engine-args",
        metavar="JSON",
        default="{}",
        help="arguments for lm-eval's vllm model and vllm.LLM, with --backend vllm",
    )
    parser.add_argument("-o", "--output", metavar="E.json", type=Path, help="file for the results")
    parser.add_argument("--resume", action="store_true", help="keep the results in E.json")
    add_force(parser)
    parser.add_argument(
        "--write-back", action="store_true", help="also store the results in the manifest"
    )
    add_json(parser)


def _add_measures(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--perplexity",
        metavar="TEXT,…",
        type=words,
        help=f"{', '.join(JUDGED_TEXTS)}, {EMBEDDED} or a file (default: wikitext2, unless --tasks "
        "are given)",
    )
    add_sequence_length(parser)
    parser.add_argument(
        "--sequences", metavar="N", type=int, help="use only the first N sequences of each text"
    )
    parser.add_argument(
        "--tasks",
        metavar="TASK,…",
        type=words,
        nargs="?",
        default=(),
        const=PAPER_TASKS,
        help=f"lm-eval tasks (without names: {', '.join(PAPER_TASKS)})",
    )
    parser.add_argument(
        "--no-answers",
        dest="answers",
        action="store_false",
        help="skip comparing the pruned and dense models' answers to short questions",
    )
    parser.add_argument("--limit", metavar="N", type=int, help="use only N rows of each task")
    parser.add_argument("--num-fewshot", metavar="N", type=int, help="examples in the prompt")


def _run(options: argparse.Namespace) -> int:
    if options.write_back and options.manifest is None:
        raise SlebError("--write-back puts results into a manifest: give one with -m")
    manifest = None
    if options.manifest is not None or options.removal_list is not None:
        manifest = manifest_of_options(options)
        if options.write_back and manifest.source is not None:
            raise SlebError(
                f"--write-back cannot write to {manifest.source}: give a file, and push it again "
                f"(`sleb-serve push`)"
            )
    names = EvalConfig.__dataclass_fields__.keys() - {"perplexity", "engine_args"}
    engine = strict_json.load(options.engine_args.encode())
    config = EvalConfig(
        perplexity=options.perplexity or (() if options.tasks else EvalConfig.perplexity),
        engine_args=strict_json.any_object(engine, "--engine-args"),
        **{name: getattr(options, name) for name in names},
    )
    pictures: list[Output] = []
    if options.output is not None and len(options.blocks or ()) > 1:
        require("eval", "matplotlib")  # before hours of work, not at the end
        if not is_stream(options.output):
            pictures = [(_picture_path(options.output), PICTURE)]
    with claimed(pictures, force=options.force):
        return _judged(options, manifest, config, pictures)


def _judged(
    options: argparse.Namespace,
    manifest: Manifest | None,
    config: EvalConfig,
    pictures: Sequence[Output],
) -> int:
    report = evaluate(
        options.model,
        manifest,
        config,
        options.output,
        resume=options.resume,
        force=options.force,
        progress=EvalLines(),
    )
    if not options.tasks:
        say(
            "note: perplexity does not show lost reasoning; add --tasks, with a generative one "
            "such as gsm8k"
        )
    tell(json.dumps(report, indent=2) if options.json else evaluation_table(report))
    if options.output is not None:
        say(f"wrote {options.output}")
    for picture, _ in pictures:
        draw(report, picture)
        say(f"wrote {picture}")
    if options.write_back and manifest is not None:
        with_evaluation(manifest, report).write(Path(options.manifest))
        say(f"wrote the results into {options.manifest}")
    return 0


def _picture_path(output: Path) -> Path:
    check_writable(output)
    picture: Path = output.with_suffix(".png")
    if picture == output:
        raise SlebError(f"--output {output}: the picture is written there; name the report .json")
    return picture


COMMANDS = (
    Command(
        "eval",
        "measure the pruned model's quality: perplexity and lm-eval tasks",
        _add,
        _run,
        _EXAMPLES,
    ),
)
