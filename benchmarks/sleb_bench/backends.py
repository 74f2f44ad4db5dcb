"""Backends of an engine's process: vLLM, or Transformers with the paper's protocol."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any, Protocol

from sleb_serve.roofline.workload import Prompts, Workload

Measured = tuple[float, int, int, int]
"""Seconds, requests, input tokens, output tokens."""
_PROFILE_ROWS = 100


class Backend(Protocol):
    """A loaded model to measure."""

    def about(self) -> dict[str, Any]:
        """Return versions and the size of the KV cache, if any."""

    def measure(self, workload: Workload, prompts: Prompts) -> Measured:
        """Run once; raise ValueError if the result is not as requested."""

    def loss(self, sequences: Prompts) -> float:
        """Return the mean nats per predicted token."""

    def profile(self, workload: Workload, prompts: Prompts) -> str:
        """Profile one run."""


def _profiled(run: Callable[[], object]) -> str:
    """Return the operators of this process by self time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        run()
    averages = found.key_averages()
    return str(averages.table(sort_by="self_cpu_time_total", row_limit=_PROFILE_ROWS))


class VllmBackend:
    """vLLM's own engine.

    Args:
        arguments: keyword arguments of ``vllm.LLM``.
    """

    def __init__(self, **arguments: Any) -> None:
        import vllm

        self._llm = vllm.LLM(**arguments)

    def about(self) -> dict[str, Any]:
        """Return the KV cache in tokens and in sequences of maximum length, and versions."""
        import torch
        import vllm

        config = self._llm.llm_engine.vllm_config
        tokens = config.cache_config.num_gpu_blocks * config.cache_config.block_size
        return {
            "kv_cache_tokens": tokens,
            "kv_cache_blocks": config.cache_config.num_gpu_blocks,
            "max_concurrency": tokens / config.model_config.max_model_len,
            "vllm": vllm.__version__,
            "torch": torch.__version__,
        }

    def measure(self, workload: Workload, prompts: Prompts) -> Measured:
        """Run once, and check the token counts and that the prefix cache was not used."""
        start = time.perf_counter()
        outputs = self._generate(prompts, max_tokens=workload.output_length)
        elapsed = time.perf_counter() - start
        if workload.measure == "decode":
            begin = max(output.metrics.first_token_ts for output in outputs)
            if begin != min(output.metrics.first_token_ts for output in outputs):
                raise ValueError(
                    "the prompts were not all processed in one step; use a smaller batch"
                )
            elapsed = max(output.metrics.last_token_ts for output in outputs) - begin
        inputs = sum(len(output.prompt_token_ids) for output in outputs)
        generated = sum(len(output.outputs[0].token_ids) for output in outputs)
        if (inputs, generated) != (sum(map(len, prompts)), workload.output_length * len(prompts)):
            raise ValueError(f"{inputs} tokens in and {generated} out are not what was asked for")
        if any(output.num_cached_tokens for output in outputs):
            raise ValueError("a prompt was answered from the prefix cache")
        return elapsed, len(outputs), inputs, generated

    def loss(self, sequences: Prompts) -> float:
        """Compute the loss from prompt log-probabilities."""
        outputs = self._generate(sequences, max_tokens=1, prompt_logprobs=0)
        nats: list[float] = [
            -logprobs[token].logprob
            for output in outputs
            for token, logprobs in zip(
                output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
            )
        ]
        return sum(nats) / len(nats)

    def profile(self, workload: Workload, prompts: Prompts) -> str:
        """Profile this process; with several ranks, operators run in other processes."""
        return _profiled(lambda: self.measure(workload, prompts))

    def _generate(self, prompts: Prompts, **sampling: Any) -> Any:
        from vllm import SamplingParams

        return self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, **sampling),
            use_tqdm=False,
        )


class TransformersBackend:
    """Transformers' ``generate`` on the model with its blocks deleted, as in the paper.

    Args:
        model: checkpoint folder or hub id.
        pruning: the pruning's content (`Pruning.to_dict`), None for the dense model.
        dtype: a torch dtype's name, or auto.
    """

    def __init__(self, model: str, pruning: Mapping[str, Any] | None, dtype: str) -> None:
        from sleb_serve.checkpoint.hub import open_checkpoint
        from sleb_serve.manifest.pruning import Pruning
        from sleb_serve.manifest.repair_file import read_sidecar
        from sleb_serve.models.loading import load_model
        from sleb_serve.models.pruned import blocks_deleted

        self._model = load_model(open_checkpoint(model), dtype)
        self._stack = ExitStack()
        if pruning is not None:
            content = Pruning.from_dict(pruning)
            repair = read_sidecar(content)
            self._stack.enter_context(blocks_deleted(self._model, content.removed, repair))

    def about(self) -> dict[str, Any]:
        """Return versions."""
        import torch
        import transformers

        return {"transformers": transformers.__version__, "torch": torch.__version__}

    def measure(self, workload: Workload, prompts: Prompts) -> Measured:
        """Call ``generate`` once; generation cannot be timed separately from the prompt."""
        import torch

        if workload.measure == "decode":
            raise ValueError("Transformers' generate does not time generation apart")
        ids = torch.tensor([list(prompt) for prompt in prompts], device=self._model.device)
        length = workload.output_length
        start = time.perf_counter()
        with torch.inference_mode():
            output = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=length,
                max_new_tokens=length,
                pad_token_id=0,
                use_cache=True,
            )
        if ids.device.type == "cuda":
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        if output.shape != (len(prompts), ids.shape[1] + length):
            raise ValueError(f"{tuple(output.shape)} tokens are not what was asked for")
        return elapsed, len(prompts), ids.numel(), length * len(prompts)

    def loss(self, sequences: Prompts) -> float:
        """Compute the loss from the logits."""
        import math

        from sleb_serve.evaluation.perplexity import perplexity

        return math.log(perplexity(self._model, sequences))

    def profile(self, workload: Workload, prompts: Prompts) -> str:
        """Profile this process."""
        return _profiled(lambda: self.measure(workload, prompts))


BACKENDS: Mapping[str, Callable[..., Backend]] = MappingProxyType(
    {"vllm": VllmBackend, "transformers": TransformersBackend}
)
