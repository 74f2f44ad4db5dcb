"""``sleb-serve study``."""

from __future__ import annotations

import argparse
from pathlib import Path

from sleb_bench.study import StudyOptions, Told, study
from sleb_serve.cli.arguments import Command, add_force, add_model
from sleb_serve.cli.heal import add_step, count, weighted
from sleb_serve.cli.progress import EvalLines, HealBars, SearchBars, say, tell
from sleb_serve.data.texts import EMBEDDED, HUB_TEXTS
from sleb_serve.evaluation.evaluate import EvalConfig
from sleb_serve.healing.config import HealConfig
from sleb_serve.selection.config import SelectConfig
from sleb_serve.utils.extras import require
from sleb_serve.utils.lists import numbers, words

_EXAMPLES = """\
examples:
  sleb-serve study meta-llama/Llama-2-7b-hf -o study --text c4 --heal-tokens 10M
  sleb-serve study ./my-model -o study --blocks 2,4,6 --tasks piqa,arc_easy --limit 200
  sleb-serve study ./my-model -o study --no-heal --minutes 5

STUDY/study.html, .md, .json and .png show quality over measured speed for each depth, and the
recommended depth. Re-run the same command to continue an interrupted study.
"""


def _add(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("-o", "--output", metavar="STUDY", type=Path, required=True)
    parser.add_argument(
        "--blocks",
        metavar="K,K…",
        type=numbers,
        default=(),
        help="depths: numbers of blocks to remove (default: 10, 20 and 30 %% of them)",
    )
    text = parser.add_argument_group("text")
    text.add_argument(
        "--calibration",
        metavar="TEXT",
        default=SelectConfig.calibration,
        help=f"text for selecting blocks: {', '.join(HUB_TEXTS)}, {EMBEDDED} or a file (default: "
        "wikitext2)",
    )
    text.add_argument("--sequences", metavar="N", type=int, help="sequences of every text")
    text.add_argument("--sequence-length", metavar="L", type=int, help="tokens per sequence")
    text.add_argument(
        "--text",
        dest="texts",
        metavar="TEXT[:WEIGHT],…",
        type=weighted,
        default={"wikitext2": 1.0},
        help="text for healing (default: wikitext2)",
    )
    text.add_argument(
        "--perplexity",
        metavar="TEXT,…",
        type=words,
        default=EvalConfig.perplexity,
        help="text for evaluation (default: wikitext2)",
    )
    healing = parser.add_argument_group("healing")
    healing.add_argument("--no-heal", action="store_true", help="skip healing")
    healing.add_argument("--heal-tokens", metavar="N", type=count, help="healing tokens per depth")
    healing.add_argument("--heal-minutes", metavar="M", type=float, help="healing time per depth")
    healing.add_argument(
        "--rank", metavar="R", type=int, default=HealConfig.rank, help="rank of the updates"
    )
    add_step(healing, "heal-")
    judged = parser.add_argument_group("evaluation")
    judged.add_argument("--tasks", metavar="TASK,…", type=words, default=(), help="lm-eval tasks")
    judged.add_argument("--limit", metavar="N", type=int, help="use only N rows of each task")
    judged.add_argument(
        "--minutes", metavar="M", type=float, default=10.0, help="benchmark time (default: 10)"
    )
    judged.add_argument(
        "--engine-args", metavar="JSON", default="{}", help="vllm.LLM arguments for the benchmark"
    )
    add_force(parser)


def _run(options: argparse.Namespace) -> int:
    require("select", "torch", "transformers")
    require("bench", "matplotlib", "prometheus_client")
    healing = None
    if not options.no_heal:
        require("heal", "peft", "accelerate")
        healing = HealConfig(
            texts=options.texts,
            tokens=options.heal_tokens,
            minutes=options.heal_minutes,
            rank=options.rank,
            batch_size=options.batch_size,
            checkpointing=options.checkpointing,
            sequence_length=options.sequence_length,
        )
        healing.check()
    text = {"sequences": options.sequences, "sequence_length": options.sequence_length}
    wanted = StudyOptions(
        model=options.model,
        output=options.output,
        blocks=tuple(options.blocks),
        select=SelectConfig(calibration=options.calibration, **text),
        heal=healing,
        evaluation=EvalConfig(
            perplexity=options.perplexity, tasks=options.tasks, limit=options.limit, **text
        ),
        minutes=options.minutes,
        engine_args=options.engine_args,
        revision=options.revision,
    )
    with SearchBars() as search, HealBars() as bars:
        page = study(wanted, Told(say, search, bars, EvalLines()), force=options.force)
    tell(page.read_text())
    say(f"wrote {page.with_suffix('.html')} and its source files")
    return 0


COMMANDS = (
    Command(
        "study",
        "select, heal, evaluate and benchmark several depths, and recommend one",
        _add,
        _run,
        _EXAMPLES,
    ),
)
