"""How good a pruned model is: perplexity, lm-eval's tasks, and both over blocks removed.

Two backends answer: Transformers with the blocks deleted, one load for all of them; and the vLLM
engine that will serve, one start each. Every result is written as soon as it is there, and an
interrupted evaluation goes on with ``--resume``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from sleb_serve import __version__
from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.data.calibration import judged_windows
from sleb_serve.data.tokenizer import OFFICIAL_SEQUENCE_LENGTH, context_length, load_tokenizer
from sleb_serve.errors import SlebError, first_line
from sleb_serve.evaluation.backends import transformers_judges, vllm_judges
from sleb_serve.manifest.schema import Manifest
from sleb_serve.roofline.ideal import head_share, ideal_ratio
from sleb_serve.utils import strict_json
from sleb_serve.utils.atomic_io import check_writable, write_atomically

PAPER_TASKS = ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge")
"""The paper's five zero-shot tasks (section 4.1)."""
METRICS = ("acc", "acc_norm", "exact_match", "word_perplexity", "bits_per_byte")
"""Of lm-eval's metrics, those that are shown; its own JSON holds all."""
_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class EvalOptions:
    """What ``sleb-serve eval`` was asked for; see its ``--help``."""

    model: str
    blocks: tuple[int, ...]
    texts: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    output: Path | None = None
    sequence_length: int | None = None
    windows: int | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    backend: str = "hf"
    batch_size: str = "1"
    dtype: str = "auto"
    engine_args: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    resume: bool = False


class Progress(Protocol):
    """Told how the evaluation goes."""

    def begins(self, blocks: int, what: str) -> None:
        """A perplexity or the tasks of a model with so many blocks removed come next."""

    def known(self, blocks: int, what: str) -> None:
        """That is there already."""


def evaluate(
    options: EvalOptions,
    checkpoint: Checkpoint,
    manifest: Manifest | None,
    progress: Progress,
) -> dict[str, Any]:
    """Judge the model with each number of blocks removed.

    Args:
        options: what was asked for; 0 blocks is the dense model.
        checkpoint: the model's files, which `manifest` was held against.
        manifest: whose first K blocks are removed; None where only the dense model is judged.
        progress: told how it goes.

    Returns:
        The report, as it is written to ``options.output``.

    Raises:
        SlebError: a text or a task is not there, or a model cannot be run.
    """
    if options.tasks:
        _check_tasks(options.tasks)
    if options.output is not None:
        check_writable(options.output)
    length = options.sequence_length or min(OFFICIAL_SEQUENCE_LENGTH, context_length(checkpoint))
    if length < 2:
        raise SlebError(f"--sequence-length {length}: a window needs at least 2 tokens")
    tokenize = load_tokenizer(checkpoint)
    texts = {
        text: judged_windows(text, tokenize, length, options.windows) for text in options.texts
    }
    report = _start(options, checkpoint, manifest, length, texts)
    judges = transformers_judges if options.backend == "hf" else vllm_judges
    with judges(options, checkpoint, length) as judge_of:
        for entry in report["results"]:
            blocks = entry["blocks"]
            pruned = None if blocks == 0 or manifest is None else manifest.prefix(blocks)
            with judge_of(pruned) as judge:
                for text, windows in texts.items():
                    if text in entry["perplexity"]:
                        progress.known(blocks, text)
                        continue
                    progress.begins(blocks, text)
                    value = judge().perplexity(windows)
                    if not math.isfinite(value):
                        raise SlebError(
                            f"the perplexity on {text} with {blocks} blocks removed is {value}; "
                            f"the weights hold NaN or overflow: try --dtype float32"
                        )
                    entry["perplexity"][text] = value
                    _write(options.output, report)
                if options.tasks and entry["tasks"]:
                    progress.known(blocks, ", ".join(options.tasks))
                elif options.tasks:
                    progress.begins(blocks, ", ".join(options.tasks))
                    found = judge().tasks(options.tasks, options.limit, options.num_fewshot)
                    _write_theirs(options.output, blocks, found)
                    entry["tasks"] = _shown(found["results"])
                    _write(options.output, report)
    return report


def with_evaluation(manifest: Manifest, report: Mapping[str, Any]) -> Manifest:
    """The manifest with a report's results in place of earlier ones of the same backend."""
    kept = {key: report[key] for key in ("settings", "results", "created_by")}
    evaluation = {**manifest.evaluation, str(report["settings"]["backend"]): kept}
    return replace(manifest, evaluation=MappingProxyType(evaluation))


def _start(
    options: EvalOptions,
    checkpoint: Checkpoint,
    manifest: Manifest | None,
    length: int,
    texts: Mapping[str, Sequence[Sequence[int]]],
) -> dict[str, Any]:
    """A report without results, or what an interrupted evaluation left of the same one."""
    settings = {
        "backend": options.backend,
        "dtype": options.dtype,
        "sequence_length": length,
        "windows": {text: len(windows) for text, windows in texts.items()},
        "tasks": list(options.tasks),
        "limit": options.limit,
        "num_fewshot": options.num_fewshot,
        "batch_size": options.batch_size,
        "engine_args": dict(options.engine_args),
    }
    weights = checkpoint.weights_sha256()
    share = head_share(checkpoint) or 0.0
    removed = [] if manifest is None else list(manifest.blocks)
    report: dict[str, Any] = {
        "model": {
            "id": checkpoint.path.resolve().name if Path(options.model).is_dir() else options.model,
            "num_blocks": checkpoint.num_blocks,
            "weights_sha256": weights,
        },
        "settings": settings,
        "results": [
            {
                "blocks": blocks,
                "removed": removed[:blocks],
                "pruning": _digest(manifest, blocks),
                "ideal_speedup": ideal_ratio(checkpoint.num_blocks, blocks, share),
                "perplexity": {},
                "tasks": {},
            }
            for blocks in options.blocks
        ],
        "created_by": {"sleb_serve": __version__} | _versions(options),
    }
    if not options.resume or options.output is None or not options.output.exists():
        return report
    before = strict_json.any_object(_read(options.output), str(options.output))
    if (before.get("model"), before.get("settings")) != (report["model"], report["settings"]):
        raise SlebError(
            f"{options.output} is of another evaluation (model or settings differ); give another "
            f"-o, or leave --resume out to begin anew"
        )
    done = {(e["blocks"], e["pruning"]): e for e in before["results"]}
    for entry in report["results"]:
        earlier = done.get((entry["blocks"], entry["pruning"]), entry)
        entry |= {key: earlier[key] for key in ("perplexity", "tasks")}
    return report


def _digest(manifest: Manifest | None, blocks: int) -> str | None:
    return None if manifest is None or blocks == 0 else manifest.prefix(blocks).pruning().digest


def _versions(options: EvalOptions) -> dict[str, str]:
    names = ["torch", "transformers"] + (["lm_eval"] if options.tasks else [])
    found = {name: version(name) for name in names}
    if options.backend == "vllm":
        from sleb_serve.compat.vllm_versions import vllm_version

        found["vllm"] = vllm_version() or "unknown"
    return found


def _read(path: Path) -> Any:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SlebError(f"cannot read {path}: {first_line(error)}") from error
    if len(data) > _MAX_BYTES:
        raise SlebError(f"{path} is no evaluation: larger than {_MAX_BYTES} bytes")
    return strict_json.load(data)


def _write(path: Path | None, report: Mapping[str, Any]) -> None:
    if path is not None:
        write_atomically(path, (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())


def _write_theirs(path: Path | None, blocks: int, results: Mapping[str, Any]) -> None:
    """lm-eval's own results beside ours, as `lm_eval --output_path` writes them."""
    if path is not None:
        text = json.dumps(results, indent=2, default=str, ensure_ascii=False)
        write_atomically(path.with_name(f"{path.stem}.lm-eval-{blocks}.json"), text.encode())


def _shown(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Of lm-eval's results by task: ``acc``, ``acc_norm`` and so on, and their standard errors."""
    shown: dict[str, dict[str, float]] = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            name = metric if filter_name in ("none", "") else f"{metric},{filter_name}"
            plain = metric.removesuffix("_stderr")
            if plain in METRICS and isinstance(value, int | float) and math.isfinite(value):
                shown.setdefault(task, {})[name] = float(value)
    return shown


def _check_tasks(names: Sequence[str]) -> None:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SlebError(
            f"lm-eval is not installed ({first_line(error)}); pip install 'sleb-serve[eval]'"
        ) from error
    manager = TaskManager()
    missing = [name for name in names if not manager.match_tasks([name])]
    if missing:
        raise SlebError(
            f"lm-eval has no task {', '.join(missing)}; `lm_eval ls tasks` lists what it has"
        )
