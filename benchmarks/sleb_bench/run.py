"""The paired benchmark: dense and pruned engines side by side, measured in turns."""

from __future__ import annotations

import json
import os
import platform
import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sleb_bench.engine import Engine, Sample
from sleb_bench.report import make_report, to_markdown
from sleb_serve import strict_json
from sleb_serve.calibration import EMBEDDED, held_out_windows
from sleb_serve.checkpoint import Checkpoint
from sleb_serve.errors import SlebError, first_line
from sleb_serve.files import write_atomically
from sleb_serve.manifest import Manifest
from sleb_serve.select import load_tokenizer
from sleb_serve.serve import check_model, check_plugin, pruned_overrides

PREFILL_PROMPTS = 4
DECODE_PROMPT_LENGTH = 16
"""Short prompts: the decode workload is about generation."""
_LOSS_WINDOW = 512


@dataclass(frozen=True)
class BenchOptions:
    """What ``sleb-serve bench`` was asked for; see its ``--help``."""

    model: str
    output: Path
    starts: int = 3
    rounds: int = 3
    prompt_length: int = 512
    batch: int = 8
    output_length: int = 64
    perplexity_windows: int = 8
    engine_args: str = "{}"


def bench(options: BenchOptions, manifest: Manifest, say: Callable[[str], None]) -> str:
    """Measure `manifest` against the dense model and write records and report.

    Returns:
        The report as Markdown.

    Raises:
        SlebError: a mistake in what was asked for, or an engine that did not start or broke off.
    """
    for name in ("starts", "rounds", "prompt_length", "batch"):
        if getattr(options, name) < 1:
            raise SlebError(f"--{name.replace('_', '-')} must be at least 1")
    if options.output_length < 2:
        raise SlebError("--output-length must be at least 2: the first token ends the prefill")
    own = strict_json.any_object(strict_json.load(options.engine_args.encode()), "--engine-args")
    pruning = manifest.pruning()
    checkpoint = check_model(options.model, pruning)
    check_plugin()
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SlebError(f"cannot make the folder {options.output}: {first_line(error)}") from error

    windows = held_out_windows(
        load_tokenizer(checkpoint),
        options.perplexity_windows,
        min(_LOSS_WINDOW, options.prompt_length),
        manifest.calibration,
    )
    longest = max(options.prompt_length + 1, DECODE_PROMPT_LENGTH + options.output_length)
    arguments = {
        "model": options.model,
        "max_model_len": longest,
        # A prompt that was seen before would cost nothing; speeds would be too good by far.
        "enable_prefix_caching": False,
        # All prompts of a batch in one step, so that generation can be timed apart.
        "max_num_batched_tokens": max(longest, options.batch * DECODE_PROMPT_LENGTH, 2048),
        "max_num_seqs": options.batch,
        "disable_log_stats": False,
        **own,
    }
    theirs = strict_json.any_object(own.get("hf_overrides", {}), "--engine-args hf_overrides")
    overrides = {**theirs, **pruned_overrides(pruning, checkpoint)}
    records: list[dict[str, Any]] = [
        {
            "record": "setting",
            "model": manifest.model.id,
            "pruning": pruning.to_dict(),
            "pruning_digest": pruning.digest,
            "options": {**asdict(options), "output": str(options.output)},
            "engine_arguments": arguments,
            "quality_text": f"end of {EMBEDDED}, {len(windows)} windows",
            "head_share": _head_share(checkpoint),
            "machine": machine(),
        }
    ]
    variants = {"dense": arguments, "pruned": {**arguments, "hf_overrides": overrides}}
    for start in range(1, options.starts + 1):
        say(f"start {start} of {options.starts} of both engines; they log to {options.output}")
        with ExitStack() as stack:
            engines = {
                name: Engine(name, values, options.output / f"{name}.log")
                for name, values in variants.items()
            }
            for engine in engines.values():
                stack.callback(engine.close)
            for name, engine in engines.items():
                about = engine.ready()
                records.append({"record": "engine", "start": start, "variant": name, **about})
                say(f"{name}: ready, KV cache {about['kv_cache_tokens']} tokens")
            records += _rounds(options, start, engines, _vocabulary(checkpoint), say)
            if start == 1 and windows:
                for name, engine in engines.items():
                    loss = engine.loss(windows)
                    records.append({"record": "quality", "variant": name, "loss": loss})
                    say(f"{name}: held-out loss {loss:.4f} nats per token")
        # After each start, so that a run that breaks off has lost only what it was in.
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_atomically(options.output / "records.jsonl", lines.encode())

    report = make_report(records)
    write_atomically(options.output / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    markdown = to_markdown(report)
    write_atomically(options.output / "report.md", markdown.encode())
    return markdown


def machine() -> dict[str, Any]:
    """What was measured on: processor, cores, memory, accelerators."""
    found: dict[str, Any] = {"system": platform.platform(), "python": platform.python_version()}
    found["cpu"] = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        found["cpu"] = models[0].partition(":")[2].strip() if models else found["cpu"]
    found["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    try:
        found["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        found["memory_bytes"] = None
    return found


def _rounds(
    options: BenchOptions,
    start: int,
    engines: dict[str, Engine],
    vocabulary: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Measure by turns; round 0 is the warm-up, which is recorded and left out of the report."""
    records = []
    for number in range(options.rounds + 1):
        randomness = random.Random(f"{start} {number}")

        def prompts(count: int, length: int, source: random.Random = randomness) -> list[list[int]]:
            return [[source.randrange(vocabulary) for _ in range(length)] for _ in range(count)]

        work = {
            "prefill": (prompts(PREFILL_PROMPTS, options.prompt_length),),
            "decode": (prompts(options.batch, DECODE_PROMPT_LENGTH), options.output_length),
        }
        # Who goes first changes from round to round, so that drift favours neither.
        order = list(engines) if number % 2 else list(engines)[::-1]
        shown = []
        for workload, values in work.items():
            for name in order:
                sample: Sample = getattr(engines[name], workload)(*values)
                records.append(
                    {
                        "record": "sample",
                        "workload": workload,
                        "variant": name,
                        "start": start,
                        "round": number,
                        **asdict(sample),
                    }
                )
            times = {r["variant"]: r["elapsed_time"] for r in records[-2:]}
            shown.append(f"{workload} {times['dense'] / times['pruned']:.3f}x")
        title = f"round {number} of {options.rounds}" if number else "warm-up"
        say(f"{title}: {', '.join(shown)}")
    return records


def _vocabulary(checkpoint: Checkpoint) -> int:
    size = checkpoint.config.get("vocab_size")
    if not isinstance(size, int) or size < 2:
        raise SlebError(f"{checkpoint.path}/config.json does not say the vocabulary's size")
    return size


def _head_share(checkpoint: Checkpoint) -> float | None:
    """The head's share of the weights that a generated token has to read."""
    counts = checkpoint.parameter_counts()
    if counts is None:
        return None
    hidden = checkpoint.config.get("hidden_size", checkpoint.config.get("n_embd"))
    if not isinstance(hidden, int):
        return None
    head = hidden * _vocabulary(checkpoint)
    return head / (head + sum(counts[1]))
