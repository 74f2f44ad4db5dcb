"""How good a pruned model is: perplexity, lm-eval's tasks, and both over blocks removed.

Two backends answer: Transformers with the blocks deleted, one load for all of them; and the vLLM
engine that will serve, one start each. Every result is written as soon as it is there, and an
interrupted evaluation goes on with ``--resume``.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from sleb_serve import __version__, strict_json
from sleb_serve.calibration import judged_windows
from sleb_serve.checkpoint import Checkpoint
from sleb_serve.errors import SlebError, first_line
from sleb_serve.files import check_writable, write_atomically
from sleb_serve.manifest import Manifest
from sleb_serve.select import OFFICIAL_SEQUENCE_LENGTH, context_length, load_tokenizer
from sleb_serve.speedup import head_share, ideal_ratio

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


class Judge(Protocol):
    """A model that perplexities and tasks are asked of."""

    def perplexity(self, windows: Sequence[Sequence[int]]) -> float:
        """Of windows [L]: exp of the mean of each's mean loss over its L-1 predicted tokens."""

    def tasks(
        self, names: Sequence[str], limit: int | None, num_fewshot: int | None
    ) -> dict[str, Any]:
        """What lm-eval makes of it: its own results."""


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
    judges = _transformers if options.backend == "hf" else _vllm
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
        from sleb_vllm.compat import vllm_version

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


JudgeOf = Callable[[Manifest | None], Any]


@contextmanager
def _transformers(options: EvalOptions, checkpoint: Checkpoint, length: int) -> Iterator[JudgeOf]:
    """Transformers: the model is loaded once, when it is first asked."""
    from sleb_serve.causal_lm import load_model
    from sleb_serve.deletion import blocks_deleted
    from sleb_serve.sidecar import read_sidecar

    loaded: list[Any] = []

    @contextmanager
    def judge_of(manifest: Manifest | None) -> Iterator[Callable[[], Judge]]:
        with _lazily() as enter:

            def judge() -> Judge:
                if not loaded:
                    loaded.append(load_model(checkpoint, options.dtype))
                if manifest is not None:
                    pruning = manifest.pruning()
                    enter(blocks_deleted(loaded[0], pruning.removed, read_sidecar(pruning)))
                return _TransformersJudge(loaded[0], str(checkpoint.path), options.batch_size)

            yield judge

    yield judge_of


@contextmanager
def _lazily() -> Iterator[Callable[[Any], None]]:
    """Enters one context when it is asked to, and leaves it at the end."""
    with ExitStack() as stack:
        entered: list[Any] = []

        def enter(context: Any) -> None:
            if not entered:
                entered.append(stack.enter_context(context))

        yield enter


class _TransformersJudge:
    def __init__(self, model: Any, path: str, batch_size: str) -> None:
        self._model, self._path, self._batch_size = model, path, batch_size

    def perplexity(self, windows: Sequence[Sequence[int]]) -> float:
        from sleb_serve.deletion import perplexity

        return float(perplexity(self._model, windows))

    def tasks(
        self, names: Sequence[str], limit: int | None, num_fewshot: int | None
    ) -> dict[str, Any]:
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoTokenizer

        lm = HFLM(
            pretrained=self._model,
            tokenizer=AutoTokenizer.from_pretrained(self._path),
            batch_size=self._batch_size,
        )
        return run_tasks(lm, names, limit, num_fewshot)


def run_tasks(
    lm: Any, names: Sequence[str], limit: int | None, num_fewshot: int | None
) -> dict[str, Any]:
    """lm-eval's results of its own tasks, unmodified, without the samples."""
    from lm_eval import simple_evaluate

    try:
        found: dict[str, Any] = simple_evaluate(
            model=lm, tasks=list(names), limit=limit, num_fewshot=num_fewshot, log_samples=False
        )
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        raise SlebError(f"lm-eval cannot run {', '.join(names)}: {first_line(error)}") from error
    return found


@contextmanager
def _vllm(options: EvalOptions, checkpoint: Checkpoint, length: int) -> Iterator[JudgeOf]:
    """vLLM: an engine for each number of blocks, in a process of its own that ends with it."""
    from sleb_serve.serve import check_model, check_plugin, pruned_overrides

    check_plugin()
    log = Path(os.devnull)
    if options.output is not None:
        log = options.output.with_name(f"{options.output.stem}.vllm.log")

    @contextmanager
    def judge_of(manifest: Manifest | None) -> Iterator[Callable[[], Judge]]:
        arguments: dict[str, Any] = {
            "pretrained": options.model,
            "dtype": options.dtype,
            "batch_size": "auto",
            # One token is generated behind each window; it is never fed.
            "max_model_len": max(length + 1, context_length(checkpoint) if options.tasks else 0),
            "enable_prefix_caching": False,
            **options.engine_args,
        }
        if manifest is not None:
            pruning = manifest.pruning()
            check_model(options.model, pruning)
            arguments["hf_overrides"] = {
                **arguments.get("hf_overrides", {}),
                **pruned_overrides(pruning, checkpoint),
            }
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield lambda: _VllmJudge(pool, arguments, log)

    yield judge_of


class _VllmJudge:
    def __init__(self, pool: ProcessPoolExecutor, arguments: dict[str, Any], log: Path) -> None:
        self._pool, self._arguments, self._log = pool, arguments, log

    def perplexity(self, windows: Sequence[Sequence[int]]) -> float:
        found: float = self._ask(_vllm_perplexity, windows)
        return found

    def tasks(
        self, names: Sequence[str], limit: int | None, num_fewshot: int | None
    ) -> dict[str, Any]:
        found: dict[str, Any] = self._ask(_vllm_tasks, names, limit, num_fewshot)
        return found

    def _ask(self, work: Callable[..., Any], *values: Any) -> Any:
        try:
            return self._pool.submit(work, self._arguments, str(self._log), *values).result()
        except BrokenProcessPool as error:
            raise SlebError(f"the engine ended without a word; its output is in {self._log}") from (
                error
            )
        except SlebError:
            raise
        except Exception as error:
            raise SlebError(
                f"the engine failed: {first_line(error)}; its output is in {self._log}"
            ) from error


_engine: list[Any] = []
"""In an engine's own process: the lm-eval model that holds it."""


def _vllm_lm(arguments: dict[str, Any], log: str) -> Any:
    if not _engine:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(output, 1)
        os.dup2(output, 2)
        # The windows are as long as the model's context, and one token is generated behind them.
        os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
        # So that what goes wrong in the engine is what is raised here.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from sleb_serve.lm_eval_model import VLLM

        _engine.append(VLLM(**arguments))
    return _engine[0]


def _vllm_perplexity(
    arguments: dict[str, Any], log: str, windows: Sequence[Sequence[int]]
) -> float:
    from vllm import SamplingParams

    outputs = _vllm_lm(arguments, log).model.generate(
        [{"prompt_token_ids": list(window)} for window in windows],
        SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False),
        use_tqdm=False,
    )
    losses = []
    for window, output in zip(windows, outputs, strict=True):
        entries = output.prompt_logprobs[1:]
        nats = [-e[t].logprob for t, e in zip(window[1:], entries, strict=True)]
        losses.append(math.fsum(nats) / len(nats))
    return math.exp(math.fsum(losses) / len(losses))


def _vllm_tasks(
    arguments: dict[str, Any],
    log: str,
    names: Sequence[str],
    limit: int | None,
    num_fewshot: int | None,
) -> dict[str, Any]:
    found = run_tasks(_vllm_lm(arguments, log), names, limit, num_fewshot)
    # What goes through the pipe must be plain; lm-eval's record holds dtypes and functions.
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain
