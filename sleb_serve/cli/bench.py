"""``sleb-serve bench`` and ``sleb-serve report``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from sleb_bench.compare import compare, comparison
from sleb_bench.files import report_of, write_report
from sleb_bench.markdown import to_markdown
from sleb_bench.options import (
    BENCH_EXAMPLES,
    REPORT_EXAMPLES,
    add_bench,
    add_report,
    bench_options,
)
from sleb_bench.run import bench
from sleb_serve.cli.arguments import Command, add_counts, add_force, add_model, add_removal
from sleb_serve.cli.progress import say, tell
from sleb_serve.cli.removal import manifest_of_options


def _add_bench(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_removal(parser, required=True)
    add_counts(parser, "how many of the manifest's removals to apply (default: all)")
    add_bench(parser)
    add_force(parser)


def _bench(options: argparse.Namespace) -> int:
    manifest = manifest_of_options(options)
    report = bench(bench_options(options), manifest, options.blocks, say, force=options.force)
    tell(report.read_text())
    say(f"wrote {report.with_suffix('.html')} and its source files")
    return 0


def _report(options: argparse.Namespace) -> int:
    if options.other is None:
        report = write_report(options.folder)
        tell(json.dumps(report, indent=2) if options.json else to_markdown(report))
        return 0
    before, after = report_of(options.folder), report_of(options.other)
    text, worse = comparison(before, after, (str(options.folder), str(options.other)))
    changes = [{**asdict(c), "verdict": c.verdict} for c in compare(before, after)]
    tell(json.dumps({"regression": worse, "changes": changes}, indent=2) if options.json else text)
    return int(worse)


COMMANDS = (
    Command(
        "bench",
        "benchmark the pruned model against the dense one",
        _add_bench,
        _bench,
        BENCH_EXAMPLES,
    ),
    Command(
        "report",
        "rebuild a benchmark's report, or compare two",
        add_report,
        _report,
        REPORT_EXAMPLES,
    ),
)
