"""The vLLM plugin against Transformers with the blocks deleted, on real vLLM engines."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Models
from engines import Case, check_equal, check_size, overrides, run_jobs
from sleb_serve.checkpoint.hub import open_checkpoint

pytest.importorskip("vllm")

EAGER = [
    Case("llama", ()),
    Case("llama", (2, 5)),
    Case("llama", (0,)),
    Case("llama", (7,)),
    Case("llama", (0, 3, 4, 7)),
    Case("llama", (2, 5), "bfloat16"),
    Case("opt", ()),
    Case("opt", (1, 3)),
    Case("opt", (0,)),
    Case("opt", (5,)),
    Case("opt", (1, 3), "bfloat16"),
    Case("smollm2", (5, 25, 17, 16, 18, 12)),
    Case("smollm2", (5, 25, 17, 16, 18, 12), "bfloat16"),
    Case("smollm2", (0, 29)),
]


@pytest.fixture(scope="module")
def find(models: Models, request: pytest.FixtureRequest) -> Callable[[str], Path]:
    def folder(name: str) -> Path:
        if name == "smollm2":
            path: Path = request.getfixturevalue("smollm2")
            return path
        return models(name)

    return folder


@pytest.fixture(scope="module")
def eager(
    find: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[Case, dict[str, Any]]:
    """Every eager case, in one process: dense and pruned models by turns."""
    cases = EAGER
    try:
        find("smollm2")
    except pytest.skip.Exception:
        cases = [case for case in EAGER if case.model != "smollm2"]
    jobs = [case.job(find(case.model)) for case in cases]
    results = run_jobs(jobs, tmp_path_factory.mktemp("eager"))
    return dict(zip(cases, results, strict=True))


@pytest.mark.parametrize("case", EAGER, ids=str)
def test_eager_equals_transformers_with_the_blocks_deleted(
    case: Case, eager: dict[Case, dict[str, Any]], find: Callable[[str], Path]
) -> None:
    path = find(case.model)
    check_equal(eager[case], path, case)
    check_size(eager[case], path, case)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_kv_cache_holds_more_tokens_by_the_share_of_blocks_gone(
    name: str, eager: dict[Case, dict[str, Any]], find: Callable[[str], Path]
) -> None:
    count = open_checkpoint(str(find(name))).num_blocks
    dense = eager[Case(name, ())]["kv_cache_tokens"]
    for case, result in eager.items():
        if case.model == name and case.dtype == "float32":
            ratio = result["kv_cache_tokens"] / dense
            assert ratio == pytest.approx(count / (count - len(case.removed)), rel=0.01)


def test_every_pruning_has_a_compile_cache_key_of_its_own(
    eager: dict[Case, dict[str, Any]],
) -> None:
    hashes = [r["hash"] for case, r in eager.items() if case.model == "llama"]
    assert len(set(hashes)) == len(hashes)


def test_the_dense_model_is_as_without_the_plugin(
    eager: dict[Case, dict[str, Any]], find: Callable[[str], Path], tmp_path: Path
) -> None:
    cases = [Case("llama", ()), Case("opt", ())]
    jobs = [case.job(find(case.model)) for case in cases]
    without = run_jobs(jobs, tmp_path, VLLM_PLUGINS="none")
    for case, result in zip(cases, without, strict=True):
        assert eager[case] == result


def test_ranks_equal_transformers_with_the_blocks_deleted(
    find: Callable[[str], Path], tmp_path: Path
) -> None:
    case, path = Case("opt", (1, 5)), find("opt")
    job = case.job(path, tensor_parallel_size=2)
    (result,) = run_jobs([job], tmp_path, VLLM_CPU_OMP_THREADS_BIND="0|1")
    assert len(result["ranks"]) == 2
    # One rank compares the weights with the manifest's, for all.
    said = (tmp_path / "output.log").read_text(errors="replace")
    assert said.count("Weights compared with the manifest") == 1
    check_equal(result, path, case)
    check_size(result, path, case)


def test_what_does_not_fit_is_refused_before_any_worker_starts(
    find: Callable[[str], Path], tmp_path: Path
) -> None:
    llama, opt = find("llama"), find("opt")
    good = overrides(llama, (2, 5))
    (sleb,) = good["sleb"]

    formats = {"config_format": "sleb", "load_format": "sleb"}

    def case(model: Path = llama, **changes: Any) -> dict[str, Any]:
        job = {"model": str(model), "overrides": good, "only_configure": True, "engine": formats}
        return {**job, **changes}

    def with_sleb(**changes: Any) -> dict[str, Any]:
        return {**good, "sleb": [{**sleb, **changes}]}

    cases = [
        (case(), None),
        (case(opt), "another model than .*opt.*LlamaForCausalLM, found OPTForCausalLM"),
        (case(find("mistral")), "architecture expected LlamaForCausalLM"),
        (case(overrides=with_sleb(config_sha256="0" * 64)), "config_sha256 expected 0000"),
        (case(overrides=with_sleb(num_blocks=9)), "number of decoder blocks expected 9, found 8"),
        (case(overrides=with_sleb(removed=[2, 8])), "must be between 0 and 7"),
        (case(overrides=with_sleb(extra=1)), "unknown key 'extra'"),
        (case(overrides=with_sleb(architecture="OPTForCausalLM")), "expected OPTForCausalLM"),
        (case(overrides={"architectures": good["architectures"]}), "not supported for now"),
        (case(overrides={"sleb": good["sleb"]}), "the overrides ask for architectures None"),
        (case(engine={"load_format": "sleb"}), "SlebLlamaForCausalLM.* not supported for now"),
        (case(engine={}), "SlebLlamaForCausalLM.* not supported for now"),
    ]
    results = run_jobs([job for job, _ in cases], tmp_path)
    for (_, message), result in zip(cases, results, strict=True):
        if message is None:
            assert "error" not in result
        else:
            assert re.search(message, result.get("error", "accepted")), (message, result)


def test_what_is_asked_for_in_part_is_refused_by_the_loader(
    find: Callable[[str], Path], tmp_path: Path
) -> None:
    """Each in an engine's own process: none of them answers."""
    path = find("llama")
    good = Case("llama", (2, 5)).job(path)
    own, engine = good["overrides"], good["engine"]
    plain = {k: v for k, v in engine.items() if not k.endswith("_format")}

    def overridden(**changes: Any) -> dict[str, Any]:
        return {**good, "overrides": {**own, **changes}}

    jobs = {
        "--load-format sleb was given without a manifest": {
            **good,
            "overrides": {},
            "engine": {**plain, "load_format": "sleb"},
        },
        "without a manifest; use": {**good, "overrides": {}},
        "--load-format is auto, which loads dense ones": {
            **good,
            "engine": {**plain, "config_format": "sleb"},
        },
        "--load-format is dummy, which loads dense ones": {
            **good,
            "engine": {**engine, "load_format": "dummy"},
        },
        "num_hidden_layers = 5 where the manifest leaves 6": overridden(num_hidden_layers=5),
        "--load-format tensorizer reads other files": {
            **good,
            "engine": {**engine, "model_loader_extra_config": {"reader": "tensorizer"}},
        },
        "weights_sha256 expected 0000": overridden(
            sleb=[{**own["sleb"][0], "weights_sha256": "0" * 64}]
        ),
    }
    for message, result in zip(jobs, run_jobs(list(jobs.values()), tmp_path), strict=True):
        assert message in result.get("error", "accepted"), message


@pytest.mark.parametrize(
    ("module", "name", "path", "modules"),
    [
        ("llama", "LlamaForCausalLM", "model.layers", ["self_attn.q_proj", "mlp.down_proj"]),
        (
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            "model.layers",
            ["self_attn.o_proj", "mlp.experts.3.gate_proj", "mlp.experts.3.down_proj"],
        ),
        (
            "gpt_oss",
            "GptOssForCausalLM",
            "model.layers",
            ["self_attn.q_proj", "mlp.experts", "mlp.experts.base_layer", "mlp.router"],
        ),
        (
            "gemma3_mm",
            "Gemma3ForConditionalGeneration",
            "language_model.model.layers",
            ["self_attn.q_proj"],
        ),
    ],
)
def test_an_adapters_layers_are_those_of_the_physically_pruned_model(
    module: str, name: str, path: str, modules: list[str]
) -> None:
    """By vLLM's own reading of an adapter's names. Experts' adapters need Triton to be run."""
    import importlib

    from vllm.lora.utils import parse_fine_tuned_lora_name

    from sleb_serve.cut.config import Cut
    from sleb_vllm.lora import Renumbered

    pytest.importorskip("torchvision")  # of a multimodal model's module
    kind = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
    stock, cut = getattr(kind, "hf_to_vllm_mapper", None), Cut(6, (1, 3))
    mapper = Renumbered.over(stock, path, cut)
    plain = stock and stock.get_rename_mapper()
    before = "model.language_model.layers." if module == "gemma3_mm" else "model.layers."
    for own in modules:
        for block in range(6):
            adapted = f"base_model.model.{before}{block}.{own}.lora_A.weight"
            found, _ = parse_fine_tuned_lora_name(adapted, mapper.get_rename_mapper())
            place = cut.place(block)
            if place is None:
                assert found.startswith("removed.")
                continue
            pruned = f"base_model.model.{before}{place}.{own}.lora_A.weight"
            assert found == parse_fine_tuned_lora_name(pruned, plain)[0]
    # Weights, which the loader has renamed, are mapped as by the model's own.
    weight = f"{before}4.{modules[0]}.weight"
    assert mapper._map_name(weight) == (stock._map_name(weight) if stock else weight)
