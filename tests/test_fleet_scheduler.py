"""The simulated steps of `sleb-serve plan` against vLLM's own scheduler."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from conftest import Models
from sleb_serve.roofline.simulation import Limits, Request, simulate

pytest.importorskip("vllm")


def scheduled(
    model: Path, requests: Sequence[Request], limits: Limits
) -> tuple[list[tuple[int, int]], int]:
    """New tokens and requests of each step that vLLM schedules, and how many it preempts.

    The model is not run: every request that has no more to compute is given some token. Blocks of
    the cache are of one token, so that it is full when the simulation's is.
    """
    import torch
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request as Asked
    from vllm.v1.structured_output import StructuredOutputManager

    config = EngineArgs(
        model=str(model),
        max_num_batched_tokens=limits.tokens,
        max_num_seqs=limits.sequences,
        enable_prefix_caching=False,
        async_scheduling=False,
        block_size=1,
    ).create_engine_config()
    spec = FullAttentionSpec(block_size=1, num_kv_heads=1, head_size=1, dtype=torch.float32)
    blocks = int(limits.memory) + 1  # one is vLLM's own
    config.cache_config.num_gpu_blocks = blocks
    scheduler = Scheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=1,
    )
    for number, request in enumerate(requests):
        sampling = SamplingParams(max_tokens=request.output, ignore_eos=True)
        scheduler.add_request(Asked(str(number), [1] * request.prompt, sampling, None))
    steps, preempted = [], 0
    while scheduler.has_unfinished_requests():
        output = scheduler.schedule()
        new = output.num_scheduled_tokens
        preempted += len(output.preempted_req_ids or ())
        steps.append((sum(new.values()), len(new)))
        asked = [scheduler.requests[name] for name in new]
        tokens = [[7] if r.num_computed_tokens >= r.num_tokens else [] for r in asked]
        places = {name: place for place, name in enumerate(new)}
        scheduler.update_from_output(
            output,
            ModelRunnerOutput(req_ids=list(new), req_id_to_index=places, sampled_token_ids=tokens),
        )
    return steps, preempted


def test_steps_are_those_of_vllms_scheduler(models: Models) -> None:
    source, preemptions = random.Random(0), 0
    for _ in range(60):
        requests = [
            Request(0.0, source.randint(1, 120), source.randint(1, 40))
            for _ in range(source.randint(1, 30))
        ]
        sequences = source.randint(1, 12)
        budget = source.randint(max(sequences, 16), 200)
        limits = Limits(budget, sequences, source.choice([161, 220, 300, 400, 10000]), 0, 1)
        steps: list[tuple[int, int]] = []

        def record(new: int, running: int, *_: float, to: list[tuple[int, int]] = steps) -> float:
            to.append((new, running))
            return 1.0

        run = simulate(requests, limits, record)
        assert (steps, run.preemptions) == scheduled(models("llama"), requests, limits)
        preemptions += run.preemptions
    assert preemptions > 20
