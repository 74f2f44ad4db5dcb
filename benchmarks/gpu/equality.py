"""Compare vLLM without some blocks with Transformers with them deleted."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from kit import Kit, engine_arguments, on_gpu
from made import pruned, tiny_model
from sleb_serve.serving.command import engine_arguments as pruned_arguments

PROMPTS: Sequence[list[int]] = (
    [1, *range(40, 150)],
    [7, 300, 12, 90, 5, 5, 210, 33, 8],
    [*range(100, 400, 7)],
)
TOKENS = 12
NEARER = 10
"""Required ratio of the distances to the dense model's answers and to the oracle's."""
RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


@dataclass(frozen=True)
class Case:
    """One engine: a model without some blocks, and vLLM's settings."""

    model: str
    removed: tuple[int, ...]
    dtype: str = "float32"
    runner: int = 1
    graphs: bool = False


Answers = tuple[list[list[float]], list[list[int]]]
"""By prompt: log-probabilities of its tokens except the first, and the greedy continuation."""


def cases(gpu: bool) -> list[Case]:
    """Return the engines, most valuable first; graphs and 16 bits only on a GPU."""
    gone = {"llama": (2, 5), "qwen3_moe": (1, 4), "lfm2": (1, 3)}
    plain = [Case(model, removed) for model, removed in gone.items()]
    plain.append(Case("llama", ()))
    if not gpu:
        return plain
    fast = [
        Case(model, removed, "bfloat16", runner, graphs=True)
        for runner in (1, 2)
        for model, removed in gone.items()
    ]
    rest = [Case("llama", (2, 5), runner=2), Case("llama", (), "bfloat16", graphs=True)]
    # An engine without graphs starts in a fraction of the time.
    return [fast[0], *plain, *fast[1:], *rest, Case("llama", (0, 7))]


def step_equal(kit: Kit) -> None:
    """Compare every case with Transformers on the same device and in the same dtype."""
    gpu = on_gpu()
    if not gpu:
        kit.skip("CUDA graphs", "a CPU has none")
        kit.skip("bfloat16", "most CPUs emulate it; the suite compares it where they do not")
        kit.skip("model runner 2", "it requires Triton, which has no driver for a CPU")
    known: dict[tuple[str, tuple[int, ...], str], Answers] = {}

    def oracle(model: str, removed: tuple[int, ...], dtype: str) -> Answers:
        key = model, removed, dtype
        if key not in known:
            known[key] = with_transformers(tiny_model(kit, model), removed, dtype)
        return known[key]

    for case in cases(gpu):
        with kit.telling("equality", **vars(case)) as found:
            wanted = oracle(case.model, case.removed, case.dtype)
            dense = oracle(case.model, (), case.dtype)
            answers, about = with_vllm(tiny_model(kit, case.model), case)
            found |= compared(answers, wanted, dense if case.removed else None) | about


def compared(found: Answers, wanted: Answers, dense: Answers | None) -> dict[str, Any]:
    """Return the distances of answers from the oracle, and of the oracle from the dense model."""
    largest, mean = _distance(found[0], wanted[0])
    result = {
        "max_difference": largest,
        "mean_difference": mean,
        "greedy_equal": same_tokens(found, wanted),
    }
    if dense is not None:
        result["mean_from_dense"] = _distance(found[0], dense[0])[1]
        result["equal"] = NEARER * mean < result["mean_from_dense"]
    return result


def same_tokens(found: Answers, wanted: Answers) -> float:
    """Return the share of equal greedy tokens."""
    pairs = zip(chain(*found[1]), chain(*wanted[1]), strict=True)
    same = [a == b for a, b in pairs]
    return sum(same) / len(same)


def _distance(found: list[list[float]], wanted: list[list[float]]) -> tuple[float, float]:
    gaps = [
        abs(a - b) for x, y in zip(found, wanted, strict=True) for a, b in zip(x, y, strict=True)
    ]
    return max(gaps), sum(gaps) / len(gaps)


def with_transformers(folder: Path, removed: tuple[int, ...], dtype: str) -> Answers:
    """Answer with the blocks deleted manually, with a full pass for every token."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    layers = list(model.model.layers)
    kept = [i for i in range(len(layers)) if i not in removed]
    model.model.layers = nn.ModuleList(layers[i] for i in kept)
    model.config.num_hidden_layers = len(kept)
    kinds = getattr(model.config, "layer_types", None)
    if kinds:
        model.config.layer_types = [kinds[i] for i in kept]
    model.to("cuda" if on_gpu() else "cpu")
    logprobs, tokens = [], []
    with torch.no_grad():
        for prompt in PROMPTS:
            ids = list(prompt)
            for step in range(TOKENS):
                values = torch.tensor([ids], device=model.device)
                logits = model(values, use_cache=False).logits.float()
                if not step:
                    every = logits.log_softmax(-1)[0, :-1]
                    logprobs.append(every.gather(1, values[0, 1:, None])[:, 0].tolist())
                ids.append(int(logits[0, -1].argmax()))
            tokens.append(ids[len(prompt) :])
    return logprobs, tokens


def arguments(folder: Path, removed: Sequence[int], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``vllm.LLM`` arguments for a tiny model without some blocks."""
    values = {
        "model": str(folder),
        "max_model_len": 512,
        "max_num_seqs": 8,
        "enable_prefix_caching": False,
        **({"gpu_memory_utilization": 0.1} if on_gpu() else {}),
        **own,
        **engine_arguments(),
    }
    if not removed:
        return values
    manifest, checkpoint = pruned(folder, list(removed))
    return pruned_arguments(manifest.pruning(), checkpoint, values)


def with_vllm(folder: Path, case: Case) -> tuple[Answers, dict[str, Any]]:
    """Return an engine's answers, and its reported runner and attention."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    os.environ[RUNNER] = str(case.runner - 1)
    own = {"dtype": case.dtype, "enforce_eager": not case.graphs}
    llm = LLM(**arguments(folder, case.removed, own))
    try:
        config = llm.llm_engine.vllm_config
        if config.use_v2_model_runner != (case.runner == 2):
            raise RuntimeError(f"vLLM did not take model runner {case.runner}")
        context = config.compilation_config.static_forward_context
        backends = {type(x.impl).__name__ for x in context.values() if hasattr(x, "impl")}
        graphs = str(config.compilation_config.cudagraph_mode)
        return answers_of(llm), {"attention": sorted(backends), "cudagraph_mode": graphs}
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def answers_of(llm: Any, *, prompts: bool = True, **more: Any) -> Answers:
    """Return log-probabilities of the prompts, if requested, and greedy tokens."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS],
        SamplingParams(
            temperature=0,
            max_tokens=TOKENS,
            prompt_logprobs=0 if prompts else None,
            ignore_eos=True,
            detokenize=False,
        ),
        use_tqdm=False,
        **more,
    )
    logprobs = [
        [
            entry[token].logprob
            for token, entry in zip(
                output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
            )
        ]
        for output in outputs
        if prompts
    ]
    return logprobs, [list(output.outputs[0].token_ids) for output in outputs]
