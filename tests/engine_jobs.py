"""Child process of the plugin's tests that runs vLLM engines one after another.

Usage: engine_jobs.py JOBS.json RESULTS.json. A job has a model, removed blocks, and arguments of
`vllm.LLM`; its result is the engine's output and description, or its refusal. One process for many
engines: the first start costs a quarter of a minute, the next two seconds.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# Lets this file's functions inspect the workers.
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")


def main(jobs_file: str, results_file: str) -> None:
    jobs = json.loads(Path(jobs_file).read_text())
    start_sooner()
    results = []
    for number, job in enumerate(jobs, 1):
        began = time.monotonic()
        results.append(_configure(job) if job.get("only_configure") else _try(job))
        # In the log, to find slow steps.
        print(f"job {number} took {time.monotonic() - began:.1f} s", flush=True)
        Path(results_file).write_text(json.dumps(results))


def start_sooner() -> None:
    """Skip vLLM's per-engine work that tests do not need.

    It does not change results; without it an engine starts in one second instead of five.
    """
    from vllm.model_executor.models import registry
    from vllm.platforms import current_platform
    from vllm.transformers_utils import config as transformers_config
    from vllm.transformers_utils import repo_utils

    # It looks through all that is imported, eight times an engine, and its thawing undoes ours.
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None
    # A model that is refused is looked at again, in case it was the network's fault.
    if hasattr(repo_utils, "with_retry"):
        once = functools.partial(repo_utils.with_retry, max_retries=1)
        transformers_config.with_retry = repo_utils.with_retry = once
    if current_platform.is_cpu():
        # For each class that its cache does not know it starts a process, which imports vLLM, so
        # that this one touches no GPU before the engine does.
        registry._run_in_subprocess = lambda look: look()
        # The second time it replaces what it has replaced already.
        kind = type(current_platform)
        override = getattr(kind, "register_triton_kernel_overrides", None)
        if override is not None:
            kind.register_triton_kernel_overrides = staticmethod(functools.cache(override))


def _arguments(job: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": job["model"],
        "max_model_len": 128,
        "max_num_seqs": 8,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "dtype": "float32",
        "hf_overrides": job["overrides"],
        **job.get("engine", {}),
    }


def _configure(job: dict[str, Any]) -> dict[str, Any]:
    """Run only the first process's work: refuse, or create the configuration."""
    from vllm import EngineArgs

    try:
        config = EngineArgs(**_arguments(job)).create_engine_config()
    except Exception as error:
        return {"error": str(error)}
    return {"hash": config.compute_hash()}


def _try(job: dict[str, Any]) -> dict[str, Any]:
    """Return a refusal as a result, so that later engines still run."""
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        return _pool(job) if "pool" in job else _run(job)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        cleanup_dist_env_and_memory()


def _run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    _fill_gaps(job)
    llm = LLM(**_arguments(job))
    sampling = SamplingParams(
        temperature=0,
        max_tokens=job["max_tokens"],
        prompt_logprobs=None if job.get("no_logprobs") else 0,
        ignore_eos=True,
        structured_outputs=_structured(job),
    )
    prompts = [_prompt(prompt) for prompt in job["prompts"]]
    lora = job.get("lora") and LoRARequest("adapter", 1, job["lora"])
    for _ in range(job.get("again", 0)):
        llm.generate(prompts, sampling, use_tqdm=False, lora_request=lora)
    if reload := job.get("reload"):
        llm.collective_rpc("reload_weights", args=() if reload is True else (None, reload))
    outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=lora)
    cache = llm.llm_engine.vllm_config.cache_config
    result = {
        "logprobs": [
            [
                entry[token].logprob
                for token, entry in zip(
                    output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
                )
            ]
            for output in outputs
            if output.prompt_logprobs
        ],
        "prompts": [list(output.prompt_token_ids) for output in outputs],
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "cached": [output.num_cached_tokens for output in outputs],
        "kv_cache_tokens": cache.num_gpu_blocks * cache.block_size,
        "hash": llm.llm_engine.vllm_config.compute_hash(),
        "ranks": llm.collective_rpc(_describe_worker),
        "counters": _counters(llm) if job.get("counters") else {},
    }
    llm.llm_engine.engine_core.shutdown()
    return result


def _fill_gaps(job: dict[str, Any]) -> None:
    if job.get("stand_ins"):
        import stand_ins

        stand_ins.install()


def _pool(job: dict[str, Any]) -> dict[str, Any]:
    """A vector a prompt: its embedding, its classes' probabilities, or scores of every token."""
    from vllm import LLM

    _fill_gaps(job)
    llm = LLM(**{**_arguments(job), "runner": "pooling"})
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    if job["pool"] == "embed":
        vectors = [o.outputs.embedding for o in llm.embed(prompts, use_tqdm=False)]
    elif job["pool"] == "classify":
        vectors = [o.outputs.probs for o in llm.classify(prompts, use_tqdm=False)]
    else:
        outputs = llm.encode(prompts, pooling_task=job["pool"], use_tqdm=False)
        vectors = [o.outputs.data.flatten().tolist() for o in outputs]
    result = {"vectors": vectors, "ranks": llm.collective_rpc(_describe_worker)}
    llm.llm_engine.engine_core.shutdown()
    return result


def _prompt(prompt: Any) -> dict[str, Any]:
    """A list of tokens; or a text with images, each said by its size and a seed."""
    if isinstance(prompt, list):
        return {"prompt_token_ids": prompt}
    images = [make_image(image) for image in prompt["images"]]
    return {"prompt": prompt["prompt"], "multi_modal_data": {"image": images}}


def make_image(image: dict[str, Any]) -> Any:
    import numpy as np
    from PIL import Image

    width, height = image["size"]
    pixels = np.random.default_rng(image["seed"]).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def _structured(job: dict[str, Any]) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    return StructuredOutputsParams(**job["structured"]) if "structured" in job else None


def _counters(llm: Any) -> dict[str, float]:
    """Counters, vLLM's own, of speculative decoding."""
    return {
        metric.name: metric.value
        for metric in llm.get_metrics()
        if "spec_decode" in metric.name and hasattr(metric, "value")
    }


def _describe_worker(worker: Any) -> dict[str, Any]:
    """Describe one rank's layers with vLLM's own functions."""
    model = worker.get_model()
    built = getattr(model, "sleb", None)
    return {
        "kv_cache_layers": sorted(worker.get_kv_cache_spec()),
        # The plugin counts before the CPU backend repacks weights and drops them.
        "parameters": built and built.parameters,
        "weights_read_bytes": built and built.weights_read_bytes,
        "weights_skipped_bytes": built and built.weights_skipped_bytes,
        "layers": built and built.layers,
        "weights_compared": built and built.weights_compared,
        "draft": _describe_draft(worker),
    }


def _describe_draft(worker: Any) -> dict[str, Any] | None:
    """Which modules of the draft are the model's own, and how many of their kind are in memory."""
    runner = worker.model_runner
    draft = getattr(getattr(runner, "drafter", None), "model", None)
    if draft is None:
        return None
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    weighty = (LinearBase, VocabParallelEmbedding)
    names = {id(module): name for name, module in worker.get_model().named_modules()}
    gc.collect()
    return {
        "shared": {n: names.get(id(m)) for n, m in draft.named_modules() if isinstance(m, weighty)},
        "in_target": sum(isinstance(m, weighty) for m in worker.get_model().modules()),
        "in_memory": sum(isinstance(found, weighty) for found in gc.get_objects()),
        "norms": {n: names.get(id(m)) for n, m in draft.named_modules() if n.endswith("layernorm")},
        "states": [n for n, m in draft.named_modules() if n.endswith(".attn") and id(m) in names],
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
