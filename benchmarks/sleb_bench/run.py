"""The paired benchmark: engines side by side, measured in turns, every sample kept.

A record is a JSON object with a key ``record``: ``setting`` (one, first), ``variant`` (what is
compared), ``engine`` (one start of one), ``sample``, ``quality``, ``serving`` and ``failure``. The
report is made from them alone.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sleb_bench.engine import Engine, EngineSpec
from sleb_bench.files import SCRATCH, claimed_folder, write_report
from sleb_bench.machine import machine
from sleb_bench.records import SERVING, Records
from sleb_bench.serving import ServingOptions, serve_and_load
from sleb_bench.variants import BESIDE, DENSE, Variant, make_variants
from sleb_bench.workloads import DECODE_PROMPT_LENGTH, workloads
from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.data.calibration import held_out_sequences
from sleb_serve.data.texts import EMBEDDED
from sleb_serve.data.tokenizer import load_tokenizer
from sleb_serve.errors import SlebError
from sleb_serve.manifest.binding import check_model, revision_of
from sleb_serve.manifest.schema import Manifest
from sleb_serve.roofline.ideal import head_share
from sleb_serve.roofline.workload import Prompts, Workload
from sleb_serve.serving.command import check_plugin
from sleb_serve.utils import strict_json
from sleb_serve.utils.atomic_io import write_atomically
from sleb_serve.utils.extras import require

_LOSS_LENGTH = 512
Say = Callable[[str], None]


@dataclass(frozen=True)
class BenchOptions:
    """What ``sleb-serve bench`` was asked for; see its ``--help``."""

    model: str
    output: Path
    revision: str | None = None
    workloads: tuple[str, ...] = ("prefill", "decode")
    beside: tuple[str, ...] = ()
    starts: int = 5
    rounds: int = 2
    prompt_length: int = 512
    batch: int = 8
    output_length: int = 64
    requests: int = 64
    perplexity_sequences: int = 8
    one_at_a_time: bool = False
    start_together: bool = False
    profile: bool = False
    engine_args: str = "{}"
    serving: ServingOptions = field(default_factory=ServingOptions)

    def check(self) -> None:
        """Refuse numbers that measure nothing.

        Raises:
            SlebError: naming the option.
        """
        for name in ("starts", "rounds", "prompt_length", "batch", "requests"):
            if getattr(self, name) < 1:
                raise SlebError(f"--{name.replace('_', '-')} must be at least 1")
        if self.output_length < 2:
            raise SlebError("--output-length must be at least 2: the first token ends the prefill")
        if not self.workloads:
            raise SlebError("--workloads: name at least one")
        for name in self.beside:
            if name not in BESIDE:
                raise SlebError(f"--beside: {name} is not one of {', '.join(BESIDE)}")
        self.serving.check()


def bench(
    options: BenchOptions,
    manifest: Manifest,
    counts: Sequence[int] | None,
    say: Say,
    *,
    force: bool = False,
) -> Path:
    """Measure prunings against the dense model and write records and report.

    Args:
        options: what to measure.
        manifest: what is removed.
        counts: how many of its removals, several for several prunings; None for all of them.
        say: told how it goes.
        force: write into a folder that holds other files, too.

    Returns:
        The report in Markdown, beside which the others lie.

    Raises:
        SlebError: a mistake in what was asked for, or an engine that did not start or broke off; if
            anything was measured by then, the report is there and says so.
    """
    options.check()
    require("bench", "matplotlib", "prometheus_client")
    if counts is not None and 0 in counts:
        raise SlebError("blocks=0: the dense model is always measured; leave 0 out")
    own = strict_json.any_object(strict_json.load(options.engine_args.encode()), "--engine-args")
    strict_json.any_object(own.get("hf_overrides", {}), "--engine-args hf_overrides")
    manifests = [manifest.prefix(count) for count in counts or (len(manifest.removed),)]
    revision = revision_of(options.model, manifest, options.revision)
    checkpoint = check_model(options.model, manifests[-1].pruning(), revision, fetch=True)
    check_plugin()
    todo = _workloads(options)
    arguments = _engine_arguments(options, checkpoint, todo, own)
    sequences = _sequences(options, checkpoint, manifest) if todo else ()
    with (
        claimed_folder(options.output, force),
        tempfile.TemporaryDirectory(dir=options.output, prefix=SCRATCH) as scratch,
    ):
        variants = make_variants(manifests, checkpoint, arguments, options.beside, Path(scratch))
        records = Records(options.output)
        records.add("setting", _setting(options, manifest, checkpoint, todo, len(sequences)))
        for variant in variants:
            removed = frozenset(variant.pruning.removed if variant.pruning else ())
            read = checkpoint.tensor_bytes(removed)
            records.add("variant", {**variant.about(), "weights_bytes": read[0] if read else None})
        records.save()
        with _report_if_broken(records, say):
            _measure(_Run(options, checkpoint, todo, sequences, records, say), variants)
        records.save()
        write_report(options.output)
    failures = [entry for entry in records.entries if entry["record"] == "failure"]
    if failures:
        raise SlebError(f"{failures[0]['what']}; what was measured is in {options.output}")
    return options.output / "report.md"


def _measure(run: _Run, variants: Sequence[Variant]) -> None:
    """Engines in turns, then servers under load; what is measured is saved at once."""
    options, records = run.options, run.records
    if run.todo:
        for start in range(1, options.starts + 1):
            run.start(start, variants)
            records.save()
    if SERVING in options.workloads:
        for entry in serve_and_load(
            options.serving, run.checkpoint, variants, options.output, run.say
        ):
            # The generator goes on with the entry.
            values = {key: value for key, value in entry.items() if key != "record"}
            records.add(entry["record"], values)
            records.save()


def _workloads(options: BenchOptions) -> Sequence[Workload]:
    return workloads(
        [name for name in options.workloads if name != SERVING],
        prompt_length=options.prompt_length,
        batch=options.batch,
        output_length=options.output_length,
        requests=options.requests,
    )


def _sequences(options: BenchOptions, checkpoint: Checkpoint, manifest: Manifest) -> Prompts:
    """Held-out text for the perplexity beside the speed."""
    return held_out_sequences(
        load_tokenizer(checkpoint),
        options.perplexity_sequences,
        min(_LOSS_LENGTH, options.prompt_length),
        manifest.calibration,
    )


@contextmanager
def _report_if_broken(records: Records, say: Say) -> Iterator[None]:
    """A run that breaks off leaves what it measured, and a report that says that it did."""
    try:
        yield
    except SlebError as error:
        records.add("failure", {"what": str(error)})
        records.save()
        if records.measured():
            write_report(records.folder)
            say(f"broken off; what was measured is in {records.folder}")
        raise


def _engine_arguments(
    options: BenchOptions,
    checkpoint: Checkpoint,
    todo: Sequence[Workload],
    own: Mapping[str, Any],
) -> dict[str, Any]:
    longest = max([options.prompt_length + 1, *(workload.longest for workload in todo)])
    return {
        # The very files that were compared: of a hub model, those of its revision.
        "model": str(checkpoint.path),
        "max_model_len": longest,
        # A prompt that was seen before would cost nothing; speeds would be too good by far.
        "enable_prefix_caching": False,
        # All prompts of a batch in one step, so that generation can be timed apart.
        "max_num_batched_tokens": max(longest, options.batch * DECODE_PROMPT_LENGTH, 2048),
        "max_num_seqs": max([options.batch, *(workload.num_requests for workload in todo)]),
        "disable_log_stats": False,
        **own,
    }


def _setting(
    options: BenchOptions,
    manifest: Manifest,
    checkpoint: Checkpoint,
    todo: Sequence[Workload],
    sequences: int,
) -> dict[str, Any]:
    values = {**asdict(options), "output": str(options.output)}
    # JSON has no infinity.
    values["serving"]["rates"] = [str(rate) for rate in options.serving.rates]
    return {
        "command": shlex.join(["sleb-serve", *sys.argv[1:]]),
        "model": manifest.model.id,
        "num_blocks": checkpoint.num_blocks,
        "weights_sha256": manifest.model.weights_sha256,
        "options": values,
        "workloads": [{**asdict(workload), "unit": workload.unit} for workload in todo],
        "quality_text": f"end of {EMBEDDED}, {sequences} sequences",
        "head_share": head_share(checkpoint),
        "evaluation": json.loads(manifest.to_json()).get("evaluation", {}),
        "machine": machine(),
    }


class _Run:
    """Starts the engines of all variants and measures them in turns."""

    def __init__(
        self,
        options: BenchOptions,
        checkpoint: Checkpoint,
        todo: Sequence[Workload],
        sequences: Prompts,
        records: Records,
        say: Say,
    ) -> None:
        self.options, self.todo, self._sequences = options, todo, sequences
        self.records, self.say = records, say
        self.checkpoint = checkpoint
        size = checkpoint.decoder_config.get("vocab_size")
        if not isinstance(size, int) or size < 2:
            raise SlebError(f"{checkpoint.path}/config.json does not say the vocabulary's size")
        self._vocabulary = size
        self._dense_blocks: int | None = None

    def start(self, start: int, variants: Sequence[Variant]) -> None:
        """One start of every engine, and its rounds."""
        say, options = self.say, self.options
        say(f"start {start} of {options.starts}; engines log to {options.output}")
        groups = [[variant] for variant in variants] if options.one_at_a_time else [variants]
        for group in groups:
            with ExitStack() as stack:
                engines = {}

                def begin(variant: Variant, stack: ExitStack = stack) -> Engine:
                    log = options.output / f"{variant.name}.log"
                    engine = Engine(variant.name, self._spec(variant), log)
                    stack.callback(engine.close)
                    return engine

                # One after another unless asked for, so that each has the machine to itself while
                # it starts. How large a cap is, only the dense engine knows.
                together = [v for v in group if options.start_together and not v.capped]
                begun = {variant.name: begin(variant) for variant in together}
                for variant in group:
                    engine = begun.get(variant.name) or begin(variant)
                    about = engine.ready()
                    if variant.name in begun:
                        about["startup_time"] = None  # that of all of them
                    if variant.name == DENSE:
                        self._dense_blocks = about["kv_cache_blocks"]
                    self.records.add("engine", {"start": start, "variant": variant.name, **about})
                    say(_ready(variant, about))
                    engines[variant.name] = engine
                for number in range(options.rounds + 1):
                    self._round(start, number, group, engines)
                if start == 1:
                    self._once(group, engines)

    def _spec(self, variant: Variant) -> EngineSpec:
        if not variant.capped:
            return variant.spec
        arguments = {**variant.spec.arguments, "num_gpu_blocks_override": self._dense_blocks}
        return replace(variant.spec, arguments=arguments)

    def _round(
        self, start: int, number: int, group: Sequence[Variant], engines: Mapping[str, Engine]
    ) -> None:
        """Each workload on each engine; round 0 is the warm-up, which the report leaves out."""
        shown = []
        # Who goes first changes from round to round, so that drift favours none.
        order = list(group) if (start + number) % 2 else list(group)[::-1]
        for workload in self.todo:
            prompts = workload.prompts(self._vocabulary, f"{start} {number}")
            times = {}
            for variant in order:
                if not variant.can(workload.measure):
                    continue
                sample = engines[variant.name].measure(workload, prompts)
                times[variant.name] = sample.elapsed_time
                place = {"variant": variant.name, "start": start, "round": number}
                self.records.add("sample", {"workload": workload.name, **place, **asdict(sample)})
            shown += [
                f"{workload.name} {v.name} {times[v.over] / times[v.name]:.3f}x"
                for v in group
                if v.over in times and v.name in times
            ]
        title = f"round {number} of {self.options.rounds}" if number else "warm-up"
        self.say(f"{title}: {', '.join(shown) or 'done'}")

    def _once(self, group: Sequence[Variant], engines: Mapping[str, Engine]) -> None:
        """What every start would give again: the quality, and where the time goes."""
        for variant in group:
            engine = engines[variant.name]
            if self._sequences:
                loss = engine.loss(self._sequences)
                self.records.add("quality", {"variant": variant.name, "loss": loss})
                self.say(f"{variant.name}: held-out loss {loss:.4f} nats per token")
            for workload in self.todo if self.options.profile else ():
                if variant.can(workload.measure):
                    table = engine.profile(workload, workload.prompts(self._vocabulary, "profile"))
                    name = f"profile-{variant.name}-{workload.name}.txt"
                    write_atomically(self.options.output / name, table.encode())


def _ready(variant: Variant, about: Mapping[str, Any]) -> str:
    cache = about.get("kv_cache_tokens")
    size = "" if cache is None else f", KV cache {cache} tokens"
    took = about["startup_time"]
    return f"{variant.name}: ready{'' if took is None else f' in {took:.0f} s'}{size}"
