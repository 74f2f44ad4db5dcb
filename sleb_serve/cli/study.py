"""``sleb-serve study``."""

from __future__ import annotations

import argparse
from pathlib import Path

from sleb_bench.study import StudyOptions, Told, study
from sleb_serve.cli.arguments import Command, add_force, add_model
from sleb_serve.cli.heal import count, weighted
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

STUDY/study.html, .md, .json and .png have quality over measured speed for each depth, and the depth
to serve. The same command again goes on where an interrupted study stopped.
"""


def _add(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("-o", "--output", metavar="STUDY", type=Path, required=True)
    parser.add_argument(
        "--blocks",
        metavar="K,K…",
        type=numbers,
        default=(),
        help="the depths: how many blocks to remove (default: 10, 20 and 30 %% of them)",
    )
    text = parser.add_argument_group("text")
    text.add_argument(
        "--calibration",
        metavar="TEXT",
        default=SelectConfig.calibration,
        help=f"to choose blocks on: {', '.join(HUB_TEXTS)}, {EMBEDDED} or a file (default: "
        "wikitext2)",
    )
    text.add_argument(
        "--sequences", metavar="N", type=int, help="of the calibration text, and of each judged one"
    )
    text.add_argument("--sequence-length", metavar="L", type=int, help="tokens a sequence")
    text.add_argument(
        "--text",
        dest="texts",
        metavar="TEXT[:WEIGHT],…",
        type=weighted,
        default={"wikitext2": 1.0},
        help="to heal on (default: wikitext2)",
    )
    text.add_argument(
        "--perplexity",
        metavar="TEXT,…",
        type=words,
        default=EvalConfig.perplexity,
        help="to judge on (default: wikitext2)",
    )
    healing = parser.add_argument_group("healing")
    healing.add_argument("--no-heal", action="store_true", help="leave pruned models as they are")
    healing.add_argument(
        "--heal-tokens", metavar="N", type=count, help="tokens to heal each depth on, as 500K"
    )
    healing.add_argument(
        "--heal-minutes", metavar="M", type=float, help="how long to heal each depth at most"
    )
    healing.add_argument("--rank", metavar="R", type=int, default=HealConfig.rank)
    judged = parser.add_argument_group("judging")
    judged.add_argument(
        "--tasks", metavar="TASK,…", type=words, default=(), help="lm-eval's tasks, by name"
    )
    judged.add_argument("--limit", metavar="N", type=int, help="only N rows of each task")
    judged.add_argument(
        "--minutes", metavar="M", type=float, default=10.0, help="of the benchmark (default: 10)"
    )
    judged.add_argument(
        "--engine-args", metavar="JSON", default="{}", help="arguments of vllm.LLM, to measure with"
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
    say(f"wrote {page.with_suffix('.html')} and what it was made from")
    return 0


COMMANDS = (
    Command(
        "study",
        "select, heal, evaluate and measure several depths: which one to serve, on one page",
        _add,
        _run,
        _EXAMPLES,
    ),
)
