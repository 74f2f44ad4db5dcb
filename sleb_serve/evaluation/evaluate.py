"""Quality of a pruned model: perplexity and lm-eval tasks, over blocks removed.

There are two backends: Transformers with the blocks deleted, loaded once for all depths, and the
vLLM serving engine, started once per depth. Each result is written immediately, and ``--resume``
continues an interrupted evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from sleb_serve import __version__
from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.checkpoint.hub import download_weights, open_checkpoint
from sleb_serve.cut.servable import check_servable
from sleb_serve.data.calibration import judged_sequences
from sleb_serve.data.questions import question_prompts
from sleb_serve.data.tokenizer import load_tokenizer, sequence_length
from sleb_serve.errors import SlebError
from sleb_serve.evaluation.backends import (
    Judge,
    check_tasks,
    shown,
    transformers_judges,
    vllm_judges,
)
from sleb_serve.evaluation.files import (
    earlier_results,
    outputs_of,
    write_report,
    write_theirs,
)
from sleb_serve.evaluation.verdict import verdict
from sleb_serve.manifest.binding import check_model, revision_of
from sleb_serve.manifest.schema import Manifest
from sleb_serve.roofline.ideal import head_share, ideal_ratio
from sleb_serve.utils.atomic_io import is_stream
from sleb_serve.utils.outputs import claimed

PAPER_TASKS = ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge")
"""The paper's five zero-shot tasks (section 4.1)."""
ANSWERS = "answers to short questions"


@dataclass(frozen=True)
class EvalConfig:
    """Options of `sleb_serve.evaluate`.

    Attributes:
        blocks: how many of the manifest's removals to apply, several for a frontier; 0 is the dense
            model. None for all.
        perplexity: texts: ``wikitext2``, ``c4``, ``python-docs``, or files.
        tasks: names of lm-eval tasks.
        answers: whether to compare the pruned model's answers to short questions with the dense
            model's; Transformers only.
        sequence_length: tokens per sequence; None for 2,048, or the model's context if shorter.
        sequences: use only this many sequences of each text.
        limit: use only this many rows of each task.
        num_fewshot: examples in a task's prompt.
        backend: ``hf`` for Transformers, ``vllm`` for the serving engine.
        batch_size: lm-eval's batch size for Transformers: a number, or ``auto``.
        dtype: compute dtype; ``auto`` is the checkpoint's own.
        engine_args: arguments of ``vllm.LLM``.
        revision: of a hub model; None for the manifest's.
    """

    blocks: tuple[int, ...] | None = None
    perplexity: tuple[str, ...] = ("wikitext2",)
    tasks: tuple[str, ...] = ()
    answers: bool = True
    sequence_length: int | None = None
    sequences: int | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    backend: Literal["hf", "vllm"] = "hf"
    batch_size: str = "1"
    dtype: str = "auto"
    engine_args: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    revision: str | None = None

    def check(self) -> None:
        """Refuse invalid numbers with a `SlebError` that names them."""
        for name, least in (("sequences", 1), ("limit", 1), ("num_fewshot", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise SlebError(f"{name}={value}: give at least {least}")


@dataclass(frozen=True)
class Evaluation:
    """A running evaluation.

    Attributes:
        model: the name as given.
        checkpoint: its files, which match the manifest.
        manifest: None if only the dense model is evaluated.
        config: the options.
        blocks: the numbers of removed blocks to evaluate.
        texts: texts for the perplexities, as sequences of token ids.
        length: tokens per sequence.
        output: the report file, or None.
        questions: questions for comparing answers, as token ids.
    """

    model: str
    checkpoint: Checkpoint
    manifest: Manifest | None
    config: EvalConfig
    blocks: tuple[int, ...]
    length: int
    output: Path | None
    texts: Mapping[str, Sequence[Sequence[int]]]
    questions: Sequence[Sequence[int]]

    def manifest_of(self, blocks: int) -> Manifest | None:
        """Return the manifest with the given number of removals; None for the dense model."""
        return None if not blocks or self.manifest is None else self.manifest.prefix(blocks)


class Progress:
    """Receives progress events of an evaluation; does nothing by default."""

    def begins(self, blocks: int, what: str) -> None:
        """A measurement begins, with this many blocks removed."""

    def known(self, blocks: int, what: str) -> None:
        """The result already exists."""


def evaluate(
    model: str | Path,
    manifest: Manifest | None = None,
    config: EvalConfig | None = None,
    output: str | Path | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure the model with each number of blocks removed.

    Args:
        model: checkpoint folder or hub id of the dense model.
        manifest: the source of the removed blocks; None for the dense model alone.
        config: what to measure; None for the perplexity on WikiText-2.
        output: where to write the report after each result; None writes nothing.
        resume: keep the results in `output`.
        force: replace an existing `output`, even of another kind.
        progress: receives progress events.

    Returns:
        The report, as written to `output`.

    Raises:
        SlebError: a text or task is missing, or the model does not match or cannot be run.
    """
    config = config or EvalConfig()
    config.check()
    output = None if output is None else Path(output)
    theirs = _blocks(manifest, config) if config.tasks else ()
    with claimed(outputs_of(output, theirs), force=force):
        return _evaluated(str(model), manifest, config, output, resume, progress or Progress())


def _evaluated(
    model: str,
    manifest: Manifest | None,
    config: EvalConfig,
    output: Path | None,
    resume: bool,
    progress: Progress,
) -> dict[str, Any]:
    # A device or a pipe gets the report once and has no files next to it.
    file = None if output is None or is_stream(output) else output
    work = _prepared(model, manifest, config, file)
    report = _start(work, resume)
    judges = transformers_judges if work.config.backend == "hf" else vllm_judges
    with judges(work) as judge_of:
        for entry in report["results"]:
            with judge_of(work.manifest_of(entry["blocks"])) as judge:
                _fill(work, report, entry, judge, progress)
    for entry in report["results"]:
        entry["verdict"] = verdict(entry, report["results"])
    write_report(output, report)
    return report


def _prepared(
    model: str, manifest: Manifest | None, config: EvalConfig, output: Path | None
) -> Evaluation:
    """Refuse impossible requests before computing anything."""
    from sleb_serve.models.loading import generates

    revision = config.revision
    if manifest is not None:
        revision = revision_of(model, manifest, revision)
    # Report a missing model before lm-eval lists its tasks, which is slow.
    checkpoint = open_checkpoint(model, revision)
    if config.tasks:
        check_tasks(config.tasks)
    if manifest is None:
        download_weights(model, revision)
        checkpoint.check_layers()
    else:
        pruning, servable = manifest.pruning(), config.backend == "vllm"
        checkpoint = check_model(model, pruning, revision, servable=servable, fetch=True)
        checkpoint.check_layers()
        check_servable(checkpoint, pruning.cut)
    length = sequence_length(checkpoint, config.sequence_length)
    blocks = _blocks(manifest, config)
    for count in blocks:
        if count and manifest is None:
            raise SlebError(f"blocks={count}: which blocks? give a manifest")
        if count and manifest is not None:
            manifest.prefix(count)
    tokenizer = load_tokenizer(checkpoint)
    texts = {
        text: judged_sequences(text, tokenizer, length, config.sequences)
        for text in config.perplexity
    }
    asked = config.answers and config.backend == "hf" and any(blocks) and generates(checkpoint)
    questions = question_prompts(tokenizer) if asked else []
    return Evaluation(model, checkpoint, manifest, config, blocks, length, output, texts, questions)


def _blocks(manifest: Manifest | None, config: EvalConfig) -> tuple[int, ...]:
    if config.blocks is not None:
        return config.blocks
    return (0,) if manifest is None else (len(manifest.removed),)


def _fill(
    work: Evaluation,
    report: Mapping[str, Any],
    entry: dict[str, Any],
    judge: Callable[[], Judge],
    progress: Progress,
) -> None:
    """Fill in missing results of an entry, and write the report after each result."""
    blocks, config = entry["blocks"], work.config
    for text in work.texts:
        if text in entry["perplexity"]:
            progress.known(blocks, text)
            continue
        progress.begins(blocks, text)
        found = judge().text(text)
        if not math.isfinite(found.perplexity):
            raise SlebError(
                f"the perplexity on {text} with {blocks} blocks removed is {found.perplexity}; the "
                f"weights hold NaN or overflow: try dtype=float32"
            )
        entry["perplexity"][text] = found.perplexity
        if blocks and found.agreement is not None:
            entry["agreement"][text] = found.agreement
        if found.calibration_error is not None:
            entry["calibration_error"][text] = found.calibration_error
        write_report(work.output, report)
    if work.questions and blocks and entry["answers"]:
        progress.known(blocks, ANSWERS)
    elif work.questions and blocks:
        progress.begins(blocks, ANSWERS)
        entry["answers"] = judge().answers() or {}
        write_report(work.output, report)
    if config.tasks and entry["tasks"]:
        progress.known(blocks, ", ".join(config.tasks))
    elif config.tasks:
        progress.begins(blocks, ", ".join(config.tasks))
        theirs = judge().tasks(config.tasks, config.limit, config.num_fewshot)
        write_theirs(work.output, blocks, theirs)
        entry["tasks"] = shown(theirs["results"])
        write_report(work.output, report)


def with_evaluation(manifest: Manifest, report: Mapping[str, Any]) -> Manifest:
    """Return the manifest with a report's results instead of earlier ones of the same backend."""
    kept = {key: report[key] for key in ("settings", "results", "created_by")}
    evaluation = {**manifest.evaluation, str(report["settings"]["backend"]): kept}
    return replace(manifest, evaluation=MappingProxyType(evaluation))


def _start(work: Evaluation, resume: bool) -> dict[str, Any]:
    """Return an empty report, or the unfinished one of the same interrupted evaluation."""
    report = _empty(work)
    if not resume or work.output is None or not work.output.exists():
        return report
    done = earlier_results(work.output, report["model"], report["settings"])
    for entry in report["results"]:
        entry |= done.get((entry["blocks"], entry["pruning"]), {})
    return report


def _empty(work: Evaluation) -> dict[str, Any]:
    config, checkpoint, manifest = work.config, work.checkpoint, work.manifest
    share = head_share(checkpoint) or 0.0
    removed = [] if manifest is None else list(manifest.blocks)
    name = checkpoint.path.resolve().name if Path(work.model).is_dir() else work.model
    return {
        "model": {
            "id": name,
            "num_blocks": checkpoint.num_blocks,
            "weights_sha256": checkpoint.weights_sha256(),
        },
        "settings": {
            "backend": config.backend,
            "dtype": config.dtype,
            "sequence_length": work.length,
            "sequences": {text: len(sequences) for text, sequences in work.texts.items()},
            "tasks": list(config.tasks),
            "limit": config.limit,
            "num_fewshot": config.num_fewshot,
            "batch_size": config.batch_size,
            "engine_args": dict(config.engine_args),
        },
        "results": [
            {
                "blocks": blocks,
                "removed": removed[:blocks],
                "pruning": _digest(manifest, blocks),
                "ideal_speedup": ideal_ratio(checkpoint.num_blocks, blocks, share),
                "perplexity": {},
                "agreement": {},
                "calibration_error": {},
                "answers": {},
                "tasks": {},
            }
            for blocks in work.blocks
        ],
        "created_by": {"sleb_serve": __version__} | _versions(config, manifest),
    }


def _digest(manifest: Manifest | None, blocks: int) -> str | None:
    return None if manifest is None or blocks == 0 else manifest.prefix(blocks).pruning().digest


def _versions(config: EvalConfig, manifest: Manifest | None) -> dict[str, str]:
    names = ["torch", "transformers"] + (["lm_eval"] if config.tasks else [])
    found = {name: version(name) for name in names} | (manifest.made_from if manifest else {})
    if config.backend == "vllm":
        from sleb_serve.compat.vllm_versions import vllm_version

        found["vllm"] = vllm_version() or "unknown"
    return found
