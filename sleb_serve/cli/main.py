"""The command line of sleb-serve: with its progress bars, the only place that prints."""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict

from tqdm import tqdm

from sleb_bench.compare import compare, comparison
from sleb_bench.files import report_of, write_report
from sleb_bench.markdown import to_markdown
from sleb_bench.options import bench_options
from sleb_bench.run import bench
from sleb_serve.checkpoint.hub import download_weights, open_checkpoint
from sleb_serve.cli.options import parsers
from sleb_serve.cli.progress import EvalLines, SearchBars, ShardBar, say
from sleb_serve.compat.architectures import support, support_markdown, support_text
from sleb_serve.convert.export import export
from sleb_serve.convert.lists import imported, llama_cpp_list, manifest_of, read_blocks
from sleb_serve.convert.mergekit import mergekit_config
from sleb_serve.cut.servable import check_countable, check_servable
from sleb_serve.errors import SlebError
from sleb_serve.evaluation.evaluate import EvalOptions, evaluate, with_evaluation
from sleb_serve.evaluation.picture import draw
from sleb_serve.evaluation.report import describe, evaluation_table
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.manifest.schema import Manifest
from sleb_serve.roofline.device import device_here
from sleb_serve.roofline.plan import (
    GPUS,
    HERE,
    Gpu,
    default_removed,
    describe_plan,
    plan,
    read_shape,
)
from sleb_serve.selection.distributed import is_first
from sleb_serve.selection.log import log_path
from sleb_serve.selection.memory import format_size
from sleb_serve.selection.metrics import SearchMetrics
from sleb_serve.selection.pipeline import Progress, SelectOptions, select
from sleb_serve.serving.canary import canary, read_prompts
from sleb_serve.serving.client import Client, ServerError
from sleb_serve.serving.command import (
    check_model,
    check_plugin,
    draft_command,
    plugin_environment,
    revision_of,
    serve_command,
)
from sleb_serve.serving.preflight import check
from sleb_serve.serving.probe import NotReadyError, probe
from sleb_serve.serving.speculative import value_of
from sleb_serve.utils import strict_json
from sleb_serve.utils.atomic_io import check_writable, write_atomically


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, or 2 for a mistake in what was asked for.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show a bar must not lose the table beside it.
            stream.reconfigure(errors="replace")
    try:
        return _run(list(sys.argv[1:] if arguments is None else arguments))
    except SlebError as error:
        print(f"sleb-serve: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read the output has seen enough; Python must not complain at exit, either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # Disks fill and folders vanish under other libraries' hands, too.
        print(f"sleb-serve: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sleb-serve: interrupted", file=sys.stderr)
        return 130


def _run(arguments: Sequence[str]) -> int:
    parser, serve = parsers()
    if arguments[:1] == ["serve"]:
        return _serve(serve, arguments[1:])
    if arguments[:1] == ["lm-eval"]:
        from sleb_serve.evaluation.lm_eval import run

        run(arguments[1:])
        return 0
    options = parser.parse_args(arguments)
    commands = {
        "bench": _bench,
        "canary": _canary,
        "check": _check,
        "eval": _eval,
        "export": _export,
        "import": _import,
        "probe": _probe,
        "report": _report,
        "select": _select,
        "show": _show,
    }
    if options.command in commands:
        return commands[options.command](options)
    if options.json:
        print(json.dumps(support(), indent=2))
    else:
        print(support_markdown() if options.markdown else support_text())
    return 0


def _select(options: argparse.Namespace) -> int:
    apart = {"command", "metrics_port"}
    values = {name: value for name, value in vars(options).items() if name not in apart}
    with ExitStack() as stack:
        bars = stack.enter_context(SearchBars())
        progress: Progress = bars
        if options.metrics_port is not None and is_first():
            metrics = stack.enter_context(SearchMetrics(bars, options.metrics_port))
            say(f"metrics: http://localhost:{metrics.port}/metrics")
            progress = metrics
        manifest = select(SelectOptions(**values), progress)
    if is_first():
        print(describe(manifest))
        print(f"\nwrote {options.output} and {log_path(options.output)}")
    return 0


def _show(options: argparse.Namespace) -> int:
    manifest = read_manifest(options.manifest).prefix(options.blocks)
    print(manifest.to_json().decode() if options.json else describe(manifest))
    return 0


def _check(options: argparse.Namespace) -> int:
    manifest = read_manifest(options.manifest).prefix(options.blocks)
    gpu = options.gpu and _gpu(options.gpu)
    report = check(options.model, manifest, gpu, options.tp, options.revision)
    if options.json:
        print(json.dumps({"passed": report.passed, **asdict(report)}, indent=2))
    else:
        print(report.to_text())
    return int(not report.passed)


def _probe(options: argparse.Namespace) -> int:
    manifest = read_manifest(options.manifest).prefix(options.blocks)
    try:
        found = probe(Client(options.url), manifest, options.tolerance)
    except (NotReadyError, ServerError) as error:
        print(f"not ready: {error}", file=sys.stderr)
        return 1
    print(found.to_text())
    return 0


def _canary(options: argparse.Namespace) -> int:
    for name in ("requests", "max_tokens", "concurrency"):
        if getattr(options, name) < 1:
            raise SlebError(f"--{name.replace('_', '-')} must be at least 1")
    prompts = read_prompts(options.prompts, options.requests)
    dense, pruned = Client(options.dense), Client(options.pruned)
    with tqdm(total=len(prompts), unit="prompt", leave=False) as bar:
        drift = canary(
            dense, pruned, prompts, options.max_tokens, options.concurrency, lambda: bar.update()
        )
    print(json.dumps(drift.to_dict(), indent=2) if options.json else drift.to_text())
    limit = options.max_drift
    if limit is not None and not drift.loss_drift <= limit:
        say(f"the loss rose by {drift.loss_drift:.4f} nats a token, more than {limit:g}")
        return 1
    return 0


def _gpu(name: str) -> Gpu:
    if name not in GPUS:
        raise SlebError(f"--gpu {name} is not one of {', '.join(GPUS)}")
    return GPUS[name]


def _serve(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    if set(arguments) & {"-h", "--help"}:
        parser.parse_args(["--help"])
    model = next(iter(arguments), "-")
    if model.startswith("-"):
        raise SlebError("name the model right after `serve`, as vllm serve does")
    options, rest = parser.parse_known_args(arguments[1:])
    manifest = _manifest(options, model).prefix(options.blocks)
    if options.as_draft:
        command = draft_command(model, manifest, rest, options.draft_tokens)
    else:
        command = serve_command(model, manifest, rest)
    pruning = manifest.pruning()
    if options.dry_run:
        revision = revision_of(model, manifest, value_of(rest, "--revision"))
        check_servable(open_checkpoint(model, revision), pruning.cut)
    else:
        check_plugin()
    role = "draft for the whole model" if options.as_draft else "served"
    say(f"{pruning.tag}: {pruning.num_kept} of {pruning.num_blocks} blocks of {model}, {role}")
    print(shlex.join(command), flush=True)
    environment = plugin_environment()
    if options.dry_run:
        if environment:
            (name, value), *_ = environment.items()
            say(f"for GET /sleb/manifest and its metrics, set {name}={value}")
        return 0
    os.environ.update(environment)
    try:
        # In place of this process: signals and the exit code are vLLM's own.
        os.execvp(command[0], command)
    except OSError as error:
        raise SlebError(
            f"cannot start {command[0]}: {error.strerror}; is vLLM installed?"
        ) from error


def _manifest(options: argparse.Namespace, model: str) -> Manifest:
    """The manifest of -m, or one made in memory of --removal-list."""
    if options.removal_list is None:
        return read_manifest(options.manifest)
    revision = getattr(options, "revision", None)
    download_weights(model, revision)
    checkpoint = open_checkpoint(model, revision)
    blocks = read_blocks(options.removal_list, checkpoint.num_blocks).blocks
    return manifest_of(model, checkpoint, blocks, "--removal-list")


def _eval(options: argparse.Namespace) -> int:
    manifest = None
    if options.manifest is not None or options.removal_list is not None:
        manifest = _manifest(options, options.model)
    blocks = _counts(options.blocks, manifest)
    tasks = _names(options.tasks)
    texts = _names(options.perplexity) or (() if tasks else ("wikitext2",))
    if options.write_back and options.manifest is None:
        raise SlebError("--write-back puts results into a manifest: give one with -m")
    revision = options.revision
    if manifest is not None:
        revision = revision_of(options.model, manifest, revision)
    download_weights(options.model, revision)
    checkpoint = open_checkpoint(options.model, revision)
    checkpoint.check_layers()
    if manifest is not None:
        check_model(options.model, manifest.pruning(), revision, servable=options.backend == "vllm")
        check_servable(checkpoint, manifest.pruning().cut)
    keys = ("model", "output", "sequence_length", "windows", "limit", "num_fewshot", "backend")
    values = {key: getattr(options, key) for key in (*keys, "batch_size", "dtype", "resume")}
    engine = strict_json.load(options.engine_args.encode())
    wanted = EvalOptions(
        blocks=blocks,
        texts=texts,
        tasks=tasks,
        engine_args=strict_json.any_object(engine, "--engine-args"),
        **values,
    )
    report = evaluate(wanted, checkpoint, manifest, EvalLines())
    if not tasks:
        say(
            "note: perplexity does not see what a model has lost of reasoning; add --tasks, with "
            "a generative one such as gsm8k"
        )
    print(json.dumps(report, indent=2) if options.json else evaluation_table(report))
    if options.output is not None:
        say(f"wrote {options.output}")
        if len(blocks) > 1:
            picture = options.output.with_suffix(".png")
            draw(report, picture)
            say(f"wrote {picture}")
    if options.write_back and manifest is not None:
        with_evaluation(manifest, report).write(options.manifest)
        say(f"wrote the results into {options.manifest}")
    return 0


def _counts(text: str | None, manifest: Manifest | None) -> tuple[int, ...]:
    """The numbers of --blocks, each a prefix of the manifest."""
    if text is None:
        return (0,) if manifest is None else (len(manifest.removed),)
    counts = tuple(int(part) if part.isdecimal() else -1 for part in text.split(","))
    for count in counts:
        if count < 0 or len(set(counts)) != len(counts):
            raise SlebError(f"--blocks {text}: give numbers of blocks, each once, as 0,2,4")
        if count and manifest is None:
            raise SlebError(f"--blocks {text}: which blocks? give -m M.json or --removal-list")
        if count and manifest is not None:
            manifest.prefix(count)
    return counts


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in (text or "").split(",") if name))


def _export(options: argparse.Namespace) -> int:
    manifest = _manifest(options, options.model).prefix(options.blocks)
    revision = revision_of(options.model, manifest, options.revision)
    checkpoint = check_model(
        options.model, manifest.pruning(), revision, servable=False, fetch=True
    )
    for_vllm = options.for_ == "any"
    if options.format != "transformers":
        if manifest.repair is not None:
            raise SlebError(
                f"--format {options.format} only names blocks, and this manifest has a repair; "
                f"export it as a checkpoint, or select without --repair"
            )
        check_countable(checkpoint, manifest.pruning().cut)
        text = llama_cpp_list(manifest) + "\n"
        if options.format == "mergekit":
            text = mergekit_config(options.model, manifest, checkpoint.dtype)
        if str(options.output) == "-":
            print(text, end="")
        else:
            check_writable(options.output)
            write_atomically(options.output, text.encode())
        return 0
    with ShardBar() as bar:
        done = export(checkpoint, manifest, options.output, bar.shard_done, for_vllm=for_vllm)
    print(
        f"wrote {done.folder}: {done.blocks} blocks, {format_size(done.size)} in {done.shards} "
        f"files (dense {format_size(done.source_size)})"
    )
    return 0


def _import(options: argparse.Namespace) -> int:
    check_writable(options.output)
    download_weights(options.model, options.revision)
    checkpoint = open_checkpoint(options.model, options.revision)
    manifest = imported(options.source, options.model, checkpoint, options.run)
    check_servable(checkpoint, manifest.pruning().cut)
    manifest.write(options.output)
    print(describe(manifest))
    print(f"\nwrote {options.output}")
    return 0


def _bench(options: argparse.Namespace) -> int:
    if options.plan:
        return _plan(options)
    missing = [
        text
        for text, there in (
            ("MODEL", options.model),
            ("-m M.json or --removal-list", options.manifest or options.removal_list),
            ("-o DIR", options.output),
        )
        if not there
    ]
    if missing:
        raise SlebError(f"bench needs {' and '.join(missing)}; see `sleb-serve bench --help`")
    manifest = _manifest(options, options.model)
    counts = None if options.blocks is None else _counts(options.blocks, manifest)
    if counts is not None and 0 in counts:
        raise SlebError("--blocks: the dense model is always measured; leave 0 out")
    report = bench(bench_options(options), manifest, counts, say)
    print(report.read_text())
    say(f"wrote {report.with_suffix('.html')} and what it was made from")
    return 0


def _plan(options: argparse.Namespace) -> int:
    shape = read_shape(options.model or "llama-2-70b")
    for name in ("compute_efficiency", "memory_efficiency"):
        if not 0 < getattr(options, name) <= 1:
            raise SlebError(f"--{name.replace('_', '-')} is above 0 and at most 1")
    gpu = device_here() if options.gpu == HERE else _gpu(options.gpu)
    gpu = gpu.slowed(options.compute_efficiency, options.memory_efficiency)
    removed = options.removed or default_removed(shape)
    found, paper = plan(shape, gpu, options.tp, removed, options.split)
    if options.json:
        predictions = [asdict(prediction) for prediction in found]
        values = {
            "shape": asdict(shape),
            "gpu": asdict(gpu),
            "tp": options.tp,
            "split": options.split,
        }
        print(json.dumps({**values, "predictions": predictions, "paper": paper}, indent=2))
    else:
        print(describe_plan(shape, gpu, options.tp, found, paper, options.split))
    return 0


def _report(options: argparse.Namespace) -> int:
    if options.other is None:
        report = write_report(options.folder)
        print(json.dumps(report, indent=2) if options.json else to_markdown(report))
        return 0
    before, after = report_of(options.folder), report_of(options.other)
    text, worse = comparison(before, after, (str(options.folder), str(options.other)))
    changes = [{**asdict(c), "verdict": c.verdict} for c in compare(before, after)]
    print(json.dumps({"regression": worse, "changes": changes}, indent=2) if options.json else text)
    return int(worse)
