"""A study: select, heal, evaluate and benchmark several depths, and recommend one.

Each step writes a file to the study's folder and is skipped if its file exists. So an interrupted
study continues where it stopped, also within steps that can resume.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from sleb_bench.files import RECORDS, claimed_folder, report_of
from sleb_bench.run import BenchOptions, bench
from sleb_bench.study_page import write_page
from sleb_bench.turns import Say
from sleb_serve import (
    EvalConfig,
    HealConfig,
    Manifest,
    SelectConfig,
    SlebError,
    evaluate,
    heal,
    read_manifest,
    select,
)
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.data.tokenizer import context_length
from sleb_serve.evaluation.evaluate import Progress as EvalProgress
from sleb_serve.healing.config import Progress as HealProgress
from sleb_serve.selection.config import Progress as SelectProgress
from sleb_serve.utils import strict_json
from sleb_serve.utils.atomic_io import write_atomically
from sleb_serve.utils.limited import read_limited

SETTINGS = "study.settings.json"
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class StudyOptions:
    """Options of a study.

    Attributes:
        model: checkpoint folder or hub id.
        output: the study's folder.
        blocks: the depths, as numbers of removed blocks; empty for 10, 20 and 30 %.
        select: options of the selection; the number of blocks is the largest depth.
        heal: options of the healing; None to skip it.
        evaluation: options of the evaluation.
        minutes: time limit of the benchmark.
        engine_args: arguments of ``vllm.LLM``, as JSON.
        revision: of a hub model.
    """

    model: str
    output: Path
    blocks: tuple[int, ...] = ()
    select: SelectConfig = field(default_factory=SelectConfig)
    heal: HealConfig | None = field(default_factory=HealConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    minutes: float = 10.0
    engine_args: str = "{}"
    revision: str | None = None


@dataclass(frozen=True)
class Told:
    """Receivers of each step's progress."""

    say: Say
    select: SelectProgress = field(default_factory=SelectProgress)
    heal: HealProgress = field(default_factory=HealProgress)
    evaluate: EvalProgress = field(default_factory=EvalProgress)


def study(options: StudyOptions, told: Told, *, force: bool = False) -> Path:
    """Run the remaining steps, and write the page.

    Args:
        options: the options.
        told: receives progress.
        force: also write into a folder with other files.

    Returns:
        The Markdown page; HTML, JSON and the steps' outputs are in the same folder.

    Raises:
        SlebError: a step fails, or the folder contains another study.
    """
    options = replace(options, blocks=_depths(options))

    def check(folder: Path) -> None:
        (folder / SETTINGS).stat()

    with claimed_folder(options.output, force, "a study's", check):
        _settle(options)
        return _done(options, told)


def _done(options: StudyOptions, told: Told) -> Path:
    manifest = _selected(options, told)
    healed = _healed(options, manifest, told)
    evaluations = {"pruned": _judged(options, manifest, "eval.json", (0, *options.blocks), told)}
    if healed is not None:
        evaluations["healed"] = _judged(options, healed, "healed.eval.json", options.blocks, told)
    measured = _measured(options, manifest, told)
    return write_page(options.output, manifest, evaluations, measured)


def _depths(options: StudyOptions) -> tuple[int, ...]:
    """Return distinct depths in ascending order."""
    count = open_checkpoint(options.model, options.revision).num_blocks
    blocks = options.blocks or tuple(-(-count * tenths // 10) for tenths in (1, 2, 3))
    for depth in blocks:
        if not 0 < depth < count:
            raise SlebError(f"blocks={depth}: {options.model} has {count} blocks")
    return tuple(sorted(set(blocks)))


def _settle(options: StudyOptions) -> None:
    """Refuse a folder with a study with different options."""
    path = options.output / SETTINGS
    asked = json.dumps(replace(options, output=Path()), default=_plain, sort_keys=True)
    digest = hashlib.sha256(asked.encode()).hexdigest()
    if path.exists():
        before = strict_json.any_object(strict_json.load(read_limited(path, _MAX_BYTES)), str(path))
        if before.get("sha256") != digest:
            raise SlebError(
                f"{options.output} holds a study of another model or with other options; give "
                f"another `output`, or the same options to resume it"
            )
        return
    kept = {"sha256": digest, "options": json.loads(asked)}
    write_atomically(path, (json.dumps(kept, indent=2) + "\n").encode())


def _plain(value: Any) -> Any:
    """Convert dataclasses and mappings for JSON; anything else to text."""
    if is_dataclass(value):
        return {entry.name: getattr(value, entry.name) for entry in fields(value)}
    return dict(value) if isinstance(value, Mapping) else str(value)


def _selected(options: StudyOptions, told: Told) -> Manifest:
    path = options.output / "manifest.json"
    if path.exists():
        told.say("select: done before")
        return read_manifest(path)
    told.say(f"select {options.blocks[-1]} blocks to remove")
    config = replace(options.select, remove=options.blocks[-1], revision=options.revision)
    return select(options.model, config, path, resume=True, progress=told.select)


def _healed(options: StudyOptions, manifest: Manifest, told: Told) -> Manifest | None:
    if options.heal is None:
        return None
    path = options.output / "healed.json"
    if path.exists():
        told.say("heal: done before")
        return read_manifest(path)
    told.say(f"heal without {', '.join(map(str, options.blocks))} blocks")
    config = replace(options.heal, also=options.blocks[:-1], revision=options.revision)
    return heal(options.model, manifest, config, path, resume=True, progress=told.heal)


def _judged(
    options: StudyOptions, manifest: Manifest, name: str, blocks: tuple[int, ...], told: Told
) -> dict[str, Any]:
    told.say(f"evaluate {name.removesuffix('.json')}")
    config = replace(options.evaluation, blocks=blocks, revision=options.revision)
    output = options.output / name
    return evaluate(
        options.model, manifest, config, output, resume=output.exists(), progress=told.evaluate
    )


def _measured(options: StudyOptions, manifest: Manifest, told: Told) -> Mapping[str, Any]:
    """Run the benchmark on pruned models only, because healing changes no shapes."""
    folder = options.output / "bench"
    if (folder / RECORDS).exists():
        report = report_of(folder)
        if report["end"] is not None and not report["failures"]:
            told.say("bench: done before")
            return report
    told.say(f"measure dense and pruned, for {options.minutes:g} minutes at most")
    asked = BenchOptions(
        model=options.model,
        output=folder,
        revision=options.revision,
        minutes=options.minutes,
        engine_args=options.engine_args,
    )
    context = context_length(open_checkpoint(options.model, options.revision))
    # A token follows the prompt.
    fits = min(asked.prompt_length, context - 1)
    bench(replace(asked, prompt_length=fits), manifest, options.blocks, told.say)
    return report_of(folder)
