"""Evaluation backends: Transformers with the blocks deleted, or the vLLM serving engine."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sleb_serve.data.tokenizer import context_length
from sleb_serve.errors import SlebError, first_line
from sleb_serve.manifest.schema import Manifest

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from sleb_serve.evaluation.evaluate import Evaluation


@dataclass(frozen=True)
class TextResult:
    """A model's results on a text's sequences of L tokens.

    Attributes:
        perplexity: exp of the mean of each sequence's mean loss over its L-1 predicted tokens.
        agreement: share of these positions with the dense model's most likely token, or None.
        calibration_error: see `evaluation.perplexity`; or None.
    """

    perplexity: float
    agreement: float | None = None
    calibration_error: float | None = None


class Judge(Protocol):
    """A model for perplexities and tasks."""

    def text(self, name: str) -> TextResult:
        """Evaluate a text."""

    def answers(self) -> dict[str, float] | None:
        """Return the reproduced shares of the dense model's answers, or None."""

    def tasks(
        self, names: Sequence[str], limit: int | None, num_fewshot: int | None
    ) -> dict[str, Any]:
        """Run lm-eval and return its own results."""


METRICS = ("acc", "acc_norm", "exact_match", "word_perplexity", "bits_per_byte")
"""The lm-eval metrics that are shown; its own JSON has all."""
JudgeOf = Callable[[Manifest | None], Any]


@contextmanager
def transformers_judges(work: Evaluation) -> Iterator[JudgeOf]:
    """Transformers backend: loads the model once, on first use."""
    from sleb_serve.evaluation.answers import answered
    from sleb_serve.evaluation.perplexity import read
    from sleb_serve.manifest.repair_file import read_sidecar
    from sleb_serve.models.loading import load_model
    from sleb_serve.models.pruned import blocks_deleted

    loaded: list[Any] = []
    likeliest: dict[str, Any] = {}
    answers: list[Any] = []

    @contextmanager
    def judge_of(manifest: Manifest | None) -> Iterator[Callable[[], Judge]]:
        with _lazily() as enter:

            def judge() -> Judge:
                if not loaded:
                    loaded.append(load_model(work.checkpoint, work.config.dtype))
                if manifest is not None:
                    for text, sequences in work.texts.items():
                        if text not in likeliest:
                            likeliest[text] = read(loaded[0], sequences).likeliest
                    if work.questions and not answers:
                        answers.extend(answered(loaded[0], work.questions))
                    pruning = manifest.pruning()
                    enter(blocks_deleted(loaded[0], pruning.removed, read_sidecar(pruning)))
                return _TransformersJudge(loaded[0], work, likeliest, answers)

            yield judge

    yield judge_of


@contextmanager
def _lazily() -> Iterator[Callable[[Any], None]]:
    """Enters one context on request, and leaves it at the end."""
    with ExitStack() as stack:
        entered: list[Any] = []

        def enter(context: Any) -> None:
            if not entered:
                entered.append(stack.enter_context(context))

        yield enter


class _TransformersJudge:
    def __init__(
        self, model: Any, work: Evaluation, likeliest: dict[str, Any], answers: Sequence[Any]
    ) -> None:
        self._model, self._work = model, work
        self._likeliest, self._answers = likeliest, answers

    def text(self, name: str) -> TextResult:
        from sleb_serve.evaluation.perplexity import read

        found = read(self._model, self._work.texts[name])
        # The dense model comes first, and agrees with itself.
        dense = self._likeliest.setdefault(name, found.likeliest)
        agreement = float((found.likeliest == dense).double().mean())
        return TextResult(found.perplexity, agreement, found.calibration_error)

    def answers(self) -> dict[str, float] | None:
        from sleb_serve.evaluation.answers import shares

        return shares(self._model, self._answers) if self._answers else None

    def tasks(
        self, names: Sequence[str], limit: int | None, num_fewshot: int | None
    ) -> dict[str, Any]:
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoTokenizer

        lm = HFLM(
            pretrained=self._model,
            tokenizer=AutoTokenizer.from_pretrained(str(self._work.checkpoint.path)),
            batch_size=self._work.config.batch_size,
        )
        return run_tasks(lm, names, limit, num_fewshot)


def run_tasks(
    lm: Any, names: Sequence[str], limit: int | None, num_fewshot: int | None
) -> dict[str, Any]:
    """Return lm-eval's unmodified task results, without the samples."""
    from lm_eval import simple_evaluate

    try:
        found: dict[str, Any] = simple_evaluate(
            model=lm,
            tasks=list(names),
            limit=limit,
            num_fewshot=num_fewshot,
            log_samples=False,
            task_manager=known_tasks(),
        )
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        raise SlebError(f"lm-eval cannot run {', '.join(names)}: {first_line(error)}") from error
    return found


def shown(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return ``acc``, ``acc_norm`` and so on with standard errors by task, from lm-eval."""
    found: dict[str, dict[str, float]] = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            name = metric if filter_name in ("none", "") else f"{metric},{filter_name}"
            plain = metric.removesuffix("_stderr")
            if plain in METRICS and isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(task, {})[name] = float(value)
    return found


_LONGEST_TASK = 200
"""Maximum characters in a task's name."""


@cache
def known_tasks() -> TaskManager:
    """Return lm-eval's task manager; listing its tasks takes ten seconds."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SlebError(
            f"lm-eval is not installed ({first_line(error)}); pip install 'sleb-serve[eval]'"
        ) from error
    return TaskManager()


def check_tasks(names: Sequence[str]) -> None:
    """Refuse unknown lm-eval tasks.

    Raises:
        SlebError: a task is unknown, or lm-eval is not installed.
    """
    # lm-eval treats a name as a pattern, and long patterns are slow.
    known = known_tasks()
    missing = [n for n in names if len(n) > _LONGEST_TASK or not known.match_tasks([n])]
    if missing:
        raise SlebError(
            f"lm-eval has no task {', '.join(missing)}; `lm_eval ls tasks` lists what it has"
        )


@contextmanager
def vllm_judges(work: Evaluation) -> Iterator[JudgeOf]:
    """Open the vLLM backend: an engine for each number of blocks, in its own process."""
    from sleb_serve.serving.command import check_plugin, engine_arguments

    check_plugin()
    log = Path(os.devnull)
    if work.output is not None:
        log = work.output.with_name(f"{work.output.stem}.vllm.log")
    checkpoint, config = work.checkpoint, work.config

    @contextmanager
    def judge_of(manifest: Manifest | None) -> Iterator[Callable[[], Judge]]:
        arguments: dict[str, Any] = {
            # The files that were compared; for a hub model, those of its revision.
            "pretrained": str(checkpoint.path),
            "dtype": config.dtype,
            "batch_size": "auto",
            # vLLM generates one token after each sequence, which is never fed back.
            "max_model_len": max(
                work.length + 1, context_length(checkpoint) if config.tasks else 0
            ),
            "enable_prefix_caching": False,
            **config.engine_args,
        }
        if manifest is not None:
            pruning = manifest.pruning()
            arguments = engine_arguments(pruning, checkpoint, arguments)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield lambda: _VllmJudge(pool, arguments, log, work)

    yield judge_of


class _VllmJudge:
    def __init__(
        self, pool: ProcessPoolExecutor, arguments: dict[str, Any], log: Path, work: Evaluation
    ) -> None:
        self._pool, self._arguments, self._log, self._work = pool, arguments, log, work

    def text(self, name: str) -> TextResult:
        return TextResult(self._ask(_vllm_perplexity, self._work.texts[name]))

    def answers(self) -> dict[str, float] | None:
        return None

    def tasks(
        self, names: Sequence[str], limit: int | None, num_fewshot: int | None
    ) -> dict[str, Any]:
        found: dict[str, Any] = self._ask(_vllm_tasks, names, limit, num_fewshot)
        return found

    def _ask(self, work: Callable[..., Any], *values: Any) -> Any:
        try:
            return self._pool.submit(work, self._arguments, str(self._log), *values).result()
        except BrokenProcessPool as error:
            raise SlebError(f"the engine process died; see its log: {self._log}") from error
        except SlebError:
            raise
        except Exception as error:
            raise SlebError(
                f"the engine failed: {first_line(error)}; see its log: {self._log}"
            ) from error


_engine: list[Any] = []
"""Serve requests for an lm-eval model in the engine's own process."""


def _vllm_lm(arguments: dict[str, Any], log: str) -> Any:
    if not _engine:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(output, 1)
        os.dup2(output, 2)
        # The sequences fill the model's context, and vLLM generates one token after them.
        os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
        # So that errors in the engine are raised here.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from sleb_serve.evaluation.lm_eval import VLLM

        _engine.append(VLLM(**arguments))
    return _engine[0]


def _vllm_perplexity(
    arguments: dict[str, Any], log: str, sequences: Sequence[Sequence[int]]
) -> float:
    from vllm import SamplingParams

    outputs = _vllm_lm(arguments, log).model.generate(
        [{"prompt_token_ids": list(sequence)} for sequence in sequences],
        SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False),
        use_tqdm=False,
    )
    losses = []
    for sequence, output in zip(sequences, outputs, strict=True):
        entries = output.prompt_logprobs[1:]
        nats = [-e[t].logprob for t, e in zip(sequence[1:], entries, strict=True)]
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
    # The pipe needs plain values, but lm-eval's record has dtypes and functions.
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain
