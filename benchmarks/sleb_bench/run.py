"""The paired benchmark: measures engines in turns and keeps every sample.

A record is a JSON object with a key ``record``: ``setting`` (one, first), ``variant`` (a compared
model), ``engine`` (one start), ``sample`` (one turn; rounds up to 0 are warm-up), ``quality``,
``end`` (why the turns ended), ``serving`` and ``failure``. The report is built from these alone.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sleb_bench.files import SCRATCH, claimed_folder, write_report
from sleb_bench.machine import machine
from sleb_bench.records import SERVING, SLO, Records
from sleb_bench.serving import serve_and_load
from sleb_bench.serving_options import PRUNED, ServingOptions
from sleb_bench.turns import Plan, Say, measure_by_turns
from sleb_bench.variants import BESIDE, Variant, make_variants
from sleb_bench.workloads import DECODE_PROMPT_LENGTH, workloads
from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.data.calibration import held_out_sequences
from sleb_serve.data.texts import EMBEDDED
from sleb_serve.data.tokenizer import load_tokenizer
from sleb_serve.errors import SlebError
from sleb_serve.evaluation.report import recorded_verdict
from sleb_serve.manifest.binding import check_model, revision_of
from sleb_serve.manifest.schema import Manifest
from sleb_serve.roofline.ideal import head_share
from sleb_serve.roofline.workload import Prompts, Workload
from sleb_serve.serving.address import key_of_environment
from sleb_serve.serving.client import Client
from sleb_serve.serving.command import check_plugin
from sleb_serve.serving.probe import probe
from sleb_serve.utils import strict_json
from sleb_serve.utils.extras import require

_LOSS_LENGTH = 512
_HTTP = frozenset({SERVING, SLO})


@dataclass(frozen=True)
class BenchOptions:
    """Options of ``sleb-serve bench``; see its ``--help``."""

    model: str
    output: Path
    revision: str | None = None
    workloads: tuple[str, ...] = ("prefill", "decode")
    beside: tuple[str, ...] = ()
    precision: float = 2.0
    minutes: float = 10.0
    starts: int = 3
    prompt_length: int = 512
    batch: int = 8
    output_length: int = 16
    requests: int = 64
    perplexity_sequences: int = 8
    one_at_a_time: bool = False
    profile: bool = False
    engine_args: str = "{}"
    gpu_hour: float | None = None
    serving: ServingOptions = field(default_factory=ServingOptions)

    def check(self) -> None:
        """Refuse invalid numbers.

        Raises:
            SlebError: names the option.
        """
        for name in ("starts", "prompt_length", "batch", "requests"):
            if getattr(self, name) < 1:
                raise SlebError(f"--{name.replace('_', '-')} must be at least 1")
        for name in ("precision", "minutes", "gpu_hour"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise SlebError(f"--{name.replace('_', '-')} must be a number above 0")
        if self.output_length < 2:
            raise SlebError("--output-length must be at least 2: the first token ends the prefill")
        if not self.workloads:
            raise SlebError("--workloads: name at least one")
        for name in self.beside:
            if name not in BESIDE:
                raise SlebError(f"--beside: {name} is not one of {', '.join(BESIDE)}")
        self.serving.check()
        if self.serving.urls and (self.beside or not set(self.workloads) <= _HTTP):
            raise SlebError(
                f"--dense and --pruned need --workloads {SERVING},{SLO}, and no --beside"
            )


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
        manifest: the blocks to remove.
        counts: numbers of its removals, one per pruning; None for all removals.
        say: receives progress messages.
        force: also write into a folder with other files.

    Returns:
        The Markdown report; the other formats are in the same folder.

    Raises:
        SlebError: the request is invalid, or an engine did not start or failed; if anything was
            measured by then, the report exists and states the failure.
    """
    options.check()
    require("bench", "matplotlib", "prometheus_client")
    own = strict_json.any_object(strict_json.load(options.engine_args.encode()), "--engine-args")
    strict_json.any_object(own.get("hf_overrides", {}), "--engine-args hf_overrides")
    manifests = _manifests(options, manifest, counts)
    revision = revision_of(options.model, manifest, options.revision)
    checkpoint = check_model(options.model, manifests[-1].pruning(), revision, fetch=True)
    check_plugin()
    todo = _workloads(options)
    arguments = _engine_arguments(options, checkpoint, todo, own)
    sequences = _sequences(options, checkpoint, manifest) if todo else ()
    plan = _plan(options, checkpoint, todo, sequences)
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
            about = {**variant.about(), "weights_bytes": read[0] if read else None}
            if variant.pruning:
                about["verdict"] = recorded_verdict(manifest, variant.blocks)
            records.add("variant", about)
        records.save()
        with _report_if_broken(records, say):
            _measure(options, checkpoint, plan, variants, records, say)
        records.save()
        write_report(options.output)
    failures = [entry for entry in records.entries if entry["record"] == "failure"]
    if failures:
        raise SlebError(f"{failures[0]['what']}; what was measured is in {options.output}")
    return options.output / "report.md"


def _manifests(
    options: BenchOptions, manifest: Manifest, counts: Sequence[int] | None
) -> list[Manifest]:
    """Return the manifest of each pruned model."""
    if counts is not None and 0 in counts:
        raise SlebError("blocks=0: the dense model is always measured; leave 0 out")
    found = [manifest.prefix(count) for count in counts or (len(manifest.removed),)]
    if options.serving.urls:
        if len(found) > 1:
            raise SlebError("--pruned is one server: give one number of --blocks")
        # A dense server in its place would measure nothing.
        probe(Client(options.serving.urls[PRUNED], key=key_of_environment()), found[0])
    return found


def _measure(
    options: BenchOptions,
    checkpoint: Checkpoint,
    plan: Plan,
    variants: Sequence[Variant],
    records: Records,
    say: Say,
) -> None:
    """Measure engines in turns, then servers under load, and save results at once."""
    if plan.todo:
        records.add("end", measure_by_turns(plan, variants, records, say))
        records.save()
    if _HTTP & set(options.workloads):
        served = serve_and_load(
            options.serving,
            checkpoint,
            variants,
            options.output,
            say,
            ladder=SERVING in options.workloads,
            search=SLO in options.workloads,
        )
        with closing(served):
            for entry in served:
                # The generator continues to use the entry.
                values = {key: value for key, value in entry.items() if key != "record"}
                records.add(entry["record"], values)
                records.save()


def _plan(
    options: BenchOptions, checkpoint: Checkpoint, todo: Sequence[Workload], sequences: Prompts
) -> Plan:
    size = checkpoint.decoder_config.get("vocab_size")
    if not isinstance(size, int) or size < 2:
        raise SlebError(f"{checkpoint.path}/config.json has no vocab_size")

    def draw(workload: Workload, seed: str) -> Prompts:
        return workload.prompts(size, seed)

    return Plan(
        todo,
        draw,
        sequences,
        options.output,
        options.precision / 100,
        options.minutes,
        options.starts,
        options.one_at_a_time,
        options.profile,
    )


def _workloads(options: BenchOptions) -> Sequence[Workload]:
    return workloads(
        [name for name in options.workloads if name not in _HTTP],
        prompt_length=options.prompt_length,
        batch=options.batch,
        output_length=options.output_length,
        requests=options.requests,
    )


def _sequences(options: BenchOptions, checkpoint: Checkpoint, manifest: Manifest) -> Prompts:
    """Return held-out text for the perplexity."""
    return held_out_sequences(
        load_tokenizer(checkpoint),
        options.perplexity_sequences,
        min(_LOSS_LENGTH, options.prompt_length),
        manifest.calibration,
    )


@contextmanager
def _report_if_broken(records: Records, say: Say) -> Iterator[None]:
    """Save the measurements of a failed or stopped run, and a report that states a failure."""
    try:
        yield
    except BaseException as error:
        records.add("failure", {"what": str(error) or "interrupted"})
        records.save()
        if not records.measured():
            raise
        if isinstance(error, SlebError):
            write_report(records.folder)
            say(f"broken off; what was measured is in {records.folder}")
        else:
            # A signal: end soon.
            say(f"broken off; `sleb-serve report {records.folder}` shows what was measured")
        raise


def _engine_arguments(
    options: BenchOptions,
    checkpoint: Checkpoint,
    todo: Sequence[Workload],
    own: Mapping[str, Any],
) -> dict[str, Any]:
    longest = max([options.prompt_length + 1, *(workload.longest for workload in todo)])
    return {
        # The files that were compared; for a hub model, those of its revision.
        "model": str(checkpoint.path),
        "max_model_len": longest,
        # A repeated prompt would cost nothing and inflate speeds.
        "enable_prefix_caching": False,
        # All prompts of a batch in one step, so that generation can be timed separately.
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
    values["serving"]["dataset"] = options.serving.dataset and str(options.serving.dataset)
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
