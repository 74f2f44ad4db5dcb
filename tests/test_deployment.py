"""Pruned models, SmolLM2 mostly, in each way that people serve models."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import checkpoints
import oracle
from conftest import save_model
from engines import NEW_TOKENS, PROMPTS, Case, check_equal, overrides, pruning, run_jobs
from sleb_bench.server import Server, free_port
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.cli.main import main
from sleb_serve.manifest.binding import bind
from sleb_serve.manifest.schema import Manifest, Removal
from sleb_serve.protocol import FORMAT, READER_KEY
from sleb_serve.serving.speculative import draft_folder

pytest.importorskip("vllm")

REMOVED = (5, 25, 17, 16, 18, 12)
CASE = Case("smollm2", REMOVED)
LONG = [[1, *range(40, 130)], [1, *range(40, 130), 7]]
REPETITIVE = [[504, 3575, 282, 4649, 314] * 4]


def reader(name: str) -> dict[str, Any]:
    """What reads the files for the plugin's loader."""
    return {"model_loader_extra_config": {READER_KEY: name}}


@pytest.fixture(scope="module")
def jobs(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every form that one process without ranks can run, by name."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def job(**engine: Any) -> dict[str, Any]:
        return CASE.job(smollm2, **engine)

    def refused(**engine: Any) -> dict[str, Any]:
        return {**job(**engine), "only_configure": True}

    drafts = draft_folder(open_checkpoint(str(smollm2)), pruning(smollm2, REMOVED), folder / "d")
    draft = {
        "method": "draft_model",
        "model": str(drafts),
        "num_speculative_tokens": 3,
        "draft_load_config": {"load_format": FORMAT},
    }
    counted: dict[str, Any] = {"counters": True, "no_logprobs": True}
    found = {
        "chunked prefill": job(max_num_batched_tokens=16, **reader("safetensors")),
        "eager reader": job(safetensors_load_strategy="eager"),
        "many readers": job(model_loader_extra_config={"enable_multithread_load": True}),
        "transformers": job(model_impl="transformers"),
        "kv transfer": {
            **job(
                kv_transfer_config={
                    "kv_connector": "ExampleConnector",
                    "kv_role": "kv_both",
                    "kv_connector_extra_config": {"shared_storage_path": str(folder / "kv")},
                },
                block_size=32,
            ),
            "prompts": LONG,
            "again": 1,
            "no_logprobs": True,
        },
        "prefix caching": {
            **job(enable_prefix_caching=True, block_size=32),
            "prompts": LONG,
            "again": 1,
            "no_logprobs": True,
        },
        "structured": {
            **job(),
            "structured": {"regex": "(yes|no)+"},
            "no_logprobs": True,
        },
        "n-gram": {
            **job(
                speculative_config={
                    "method": "ngram",
                    "num_speculative_tokens": 3,
                    "prompt_lookup_max": 3,
                },
                disable_log_stats=False,
            ),
            **counted,
            "prompts": REPETITIVE,
        },
        "reload": {**job(), "reload": True},
        "dummy": job(**reader("dummy")),
        "lora": {
            # vLLM's LoRA on a CPU fails on prompt log-probabilities, dense as well.
            **job(enable_lora=True, max_lora_rank=8),
            "lora": str(checkpoints.lora(smollm2, folder / "lora")),
            "no_logprobs": True,
        },
        "sleep": refused(enable_sleep_mode=True),
        "sharded_state": job(load_format="sharded_state"),
        "mistral": job(load_format="mistral"),
        "another reader": job(**reader("tensorizer")),
        "expert balancing": refused(
            enable_eplb=True, enable_expert_parallel=True, tensor_parallel_size=2
        ),
    }
    for name in ("int8", "fp8", "gptq", "awq"):
        quantised = getattr(checkpoints, name)(smollm2, folder / name)
        twin = checkpoints.compacted(quantised, folder / f"{name}-twin", REMOVED)
        # Some kernels take 16-bit activations only, which ones depends on the CPU; and one without
        # FP8 spends half a second a token.
        form = {"prompts": PROMPTS[1:], "max_tokens": 4}
        found[name] = {**CASE.job(quantised, dtype="bfloat16"), **form}
        found[f"{name} twin"] = {**Case("twin", ()).job(twin, dtype="bfloat16"), **form}
    found["as draft"] = {
        **Case("dense", ()).job(
            smollm2, speculative_config=draft, config_format=FORMAT, disable_log_stats=False
        ),
        **counted,
    }
    return found


@pytest.fixture(scope="module")
def results(
    jobs: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    # vLLM starts no further engine in a process that had one which speculates.
    alone = ("n-gram", "as draft")
    found = {}
    for names in ([name for name in jobs if name not in alone], *([name] for name in alone)):
        folder = tmp_path_factory.mktemp("forms")
        results = run_jobs([jobs[name] for name in names], folder)
        found |= dict(zip(names, results, strict=True))
    return found


def check_greedy(result: dict[str, Any], model: Any, prompts: list[list[int]]) -> None:
    assert "error" not in result, result["error"]
    for prompt, tokens in zip(prompts, result["tokens"], strict=True):
        assert tokens == oracle.greedy(model, prompt, NEW_TOKENS)


@pytest.mark.parametrize(
    "form", ["chunked prefill", "reload", "eager reader", "many readers", "transformers"]
)
def test_equal_to_transformers_with_the_blocks_deleted(
    form: str, results: dict[str, dict[str, Any]], smollm2: Path
) -> None:
    check_equal(results[form], smollm2, CASE)


def test_prefixes_are_cached_and_answers_stay(
    results: dict[str, dict[str, Any]], smollm2: Path
) -> None:
    check_greedy(results["prefix caching"], oracle.pruned(smollm2, REMOVED), LONG)
    assert min(results["prefix caching"]["cached"]) >= 64


def test_caches_that_go_through_a_connector_are_the_shorter_models(
    results: dict[str, dict[str, Any]], jobs: dict[str, dict[str, Any]], smollm2: Path
) -> None:
    """A connector counts the layers in the config: one file for each that is left."""
    check_greedy(results["kv transfer"], oracle.pruned(smollm2, REMOVED), LONG)
    config = jobs["kv transfer"]["engine"]["kv_transfer_config"]["kv_connector_extra_config"]
    stored = Path(config["shared_storage_path"])
    layers = {file.name.split(".")[2] for file in stored.rglob("*.safetensors")}
    assert {int(layer) for layer in layers} == set(range(24))


def test_structured_outputs_keep_to_their_form(
    results: dict[str, dict[str, Any]], smollm2: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = oracle.pruned(smollm2, REMOVED)
    for prompt, tokens in zip(PROMPTS, results["structured"]["tokens"], strict=True):
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        # The last word may be cut off by the token limit.
        assert re.match(r"(yes|no)+", text), text
        free = oracle.greedy(model, prompt, NEW_TOKENS)
        assert not re.match(r"(yes|no)+", tokenizer.decode(free))


def test_speculation_by_n_grams_with_the_pruned_model_as_target(
    results: dict[str, dict[str, Any]], smollm2: Path
) -> None:
    result = results["n-gram"]
    check_greedy(result, oracle.pruned(smollm2, REMOVED), REPETITIVE)
    assert result["counters"]["vllm:spec_decode_num_draft_tokens"] > 0


def test_the_pruned_model_drafts_for_its_dense_self(
    results: dict[str, dict[str, Any]], smollm2: Path
) -> None:
    """The dense model's answers; and dense and pruned layers, both, have KV cache."""
    result = results["as draft"]
    check_greedy(result, oracle.load(smollm2), PROMPTS)
    assert result["counters"]["vllm:spec_decode_num_accepted_tokens"] > 0
    (rank,) = result["ranks"]
    drafting = [name for name in rank["kv_cache_layers"] if name.startswith("draft_model.")]
    assert len(drafting) == 24
    assert len(rank["kv_cache_layers"]) == 30 + 24


def test_an_adapter_trained_on_the_dense_model_applies_to_the_layers_that_are_left(
    results: dict[str, dict[str, Any]], jobs: dict[str, dict[str, Any]], smollm2: Path
) -> None:
    whole = checkpoints.merge_lora(oracle.load(smollm2), Path(jobs["lora"]["lora"]))
    check_greedy(results["lora"], oracle.delete_blocks(whole, REMOVED), PROMPTS)
    plain = oracle.greedy(oracle.pruned(smollm2, REMOVED), PROMPTS[0], NEW_TOKENS)
    assert results["lora"]["tokens"][0] != plain


def test_dummy_weights_make_the_same_shape(results: dict[str, dict[str, Any]]) -> None:
    (dummy,), (real,) = results["dummy"]["ranks"], results["chunked prefill"]["ranks"]
    assert dummy["layers"] == real["layers"]
    assert dummy["kv_cache_layers"] == real["kv_cache_layers"]


@pytest.mark.parametrize("name", ["int8", "fp8", "gptq", "awq"])
def test_quantised_equals_its_physically_pruned_twin(
    name: str, results: dict[str, dict[str, Any]]
) -> None:
    found, twin = results[name], results[f"{name} twin"]
    if "no attribute 'cpu_gemm_wna16'" in twin.get("error", ""):
        pytest.skip("this vLLM has no 4-bit kernels for a CPU without AVX-512")
    assert "error" not in found, found["error"]
    assert found["tokens"] == twin["tokens"]
    assert found["logprobs"] == twin["logprobs"]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("sleep", "Sleep mode is not supported on current platform"),  # vLLM's own
        ("sharded_state", "--load-format is sharded_state, which loads dense ones"),
        ("mistral", "--load-format is mistral, which loads dense ones"),
        ("another reader", "--load-format tensorizer reads other files"),
        ("expert balancing", "load balancing is only supported on"),  # vLLM's own, on a CPU
    ],
)
def test_what_cannot_be_served_is_refused(
    form: str, message: str, results: dict[str, dict[str, Any]]
) -> None:
    assert message in results[form].get("error", "accepted")


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four blocks: compiling takes seconds a block."""
    path = tmp_path_factory.mktemp("short") / "llama"
    save_model("llama", path, num_hidden_layers=4)
    return path


@pytest.mark.slow
def test_two_stages_hold_equally_many_of_the_layers_that_are_left(
    short: Path, tmp_path: Path
) -> None:
    # Compiled, since vLLM's own pipeline fails on a CPU in eager mode.
    case = Case("llama", (0, 1))  # all from one of the dense model's halves
    job = case.job(short, pipeline_parallel_size=2, enforce_eager=False)
    (result,) = run_jobs(
        [job], tmp_path, VLLM_CPU_OMP_THREADS_BIND="0|1", VLLM_CACHE_ROOT=str(tmp_path / "cache")
    )
    check_equal(result, short, case)
    assert [rank["layers"] for rank in result["ranks"]] == [[2], [3]]


@pytest.mark.slow
def test_two_replicas_behind_one_address_serve_the_pruned_model(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openai = pytest.importorskip("openai")
    path, removed = models("llama"), (2, 5)
    manifest = Manifest(bind(str(path), open_checkpoint(str(path))), tuple(map(Removal, removed)))
    manifest.write(tmp_path / "m.json")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    port = free_port()
    options = "--data-parallel-size 2 --enforce-eager --max-model-len 256 --dtype float32"
    command = [sys.executable, "-m", "sleb_serve.cli", "serve", str(path)]
    command += ["-m", str(tmp_path / "m.json"), *options.split(), "--port", str(port)]
    server = Server(command, port, tmp_path / "server.log")
    try:
        server.wait(300)
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        (name,) = (model.id for model in client.models.list())
        assert name.endswith(manifest.pruning().tag)
        with ThreadPoolExecutor(4) as threads:
            ask = partial(
                client.completions.create,
                model=name,
                prompt=PROMPTS[0],
                max_tokens=NEW_TOKENS,
                temperature=0,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            pending = [threads.submit(ask) for _ in range(4)]
            answers = [answer.result().choices[0].token_ids for answer in pending]
    finally:
        server.stop()
    greedy = oracle.greedy(oracle.pruned(path, removed), PROMPTS[0], NEW_TOKENS)
    assert answers == [greedy] * 4
    assert server.log.read_text().count("6 of 8 decoder layers built") == 2


def test_as_draft_prints_the_dense_model_with_its_pruned_self(
    models: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = models("llama")
    Manifest(bind(str(path), open_checkpoint(str(path))), (Removal(2), Removal(5))).write(
        tmp_path / "m.json"
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ["serve", str(path), "-m", str(tmp_path / "m.json"), "--as-draft", "--dry-run"]
    assert main([*arguments, "--draft-tokens", "5", "-tp", "2"]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert "--hf-overrides" not in command
    speculation = json.loads(command[command.index("--speculative-config") + 1])
    (folder,) = (tmp_path / "cache" / "sleb-serve" / "drafts").iterdir()
    assert speculation == {
        "method": "draft_model",
        "model": str(folder),
        "num_speculative_tokens": 5,
        "draft_tensor_parallel_size": 2,
        "draft_load_config": {"load_format": "sleb"},
    }
    assert command[command.index("--config-format") + 1] == "sleb"
    assert "--load-format" not in command
    for option in ("--speculative-config={}", "--spec-model=x", "-sc"):
        assert main([*arguments, option]) == 2
        assert "--as-draft sets up speculative decoding itself" in capsys.readouterr().err


@pytest.mark.slow
def test_one_warm_compile_cache_serves_each_pruning_its_own_graph(
    short: Path, tmp_path: Path
) -> None:
    """Dense, pruned, pruned as the manifest says once it has changed, and dense again.

    vLLM on a CPU compiles anew where a GPU would load what it finds under the same key, so the
    keys are held against each other, too.
    """
    cases = [Case("llama", removed) for removed in ((), (1,), (2,), ())]
    jobs = [case.job(short, enforce_eager=False) for case in cases]
    results = run_jobs(jobs, tmp_path, VLLM_CACHE_ROOT=str(tmp_path / "cache"))
    for case, result in zip(cases, results, strict=True):
        check_equal(result, short, case)
    hashes = [result["hash"] for result in results]
    assert len(set(hashes)) == 3
    assert hashes[0] == hashes[3]
    saved = tmp_path / "cache" / "torch_compile_cache" / "torch_aot_compile"
    assert len(list(saved.iterdir())) == 3


def test_a_draft_folder_is_found_again_and_changes_with_its_content(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(models("llama")))
    folder = draft_folder(checkpoint, pruning(checkpoint.path, (2, 5)), tmp_path)
    assert draft_folder(checkpoint, pruning(checkpoint.path, (2, 5)), tmp_path) == folder
    other = draft_folder(checkpoint, pruning(checkpoint.path, (2, 6)), tmp_path)
    assert other != folder
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([folder.name, other.name])
    config = json.loads((folder / "config.json").read_text())
    assert [config["sleb"]] == overrides(checkpoint.path, (2, 5))["sleb"]
    # An architecture that no vLLM has: without the plugin the folder must not be served whole.
    assert config["architectures"] == ["SlebLlamaForCausalLM"]
    # To everything of this project the folder is the dense model's.
    seen = open_checkpoint(str(folder))
    assert seen.architecture == checkpoint.architecture
    assert seen.config_sha256() == checkpoint.config_sha256()
    assert seen.weights_sha256() == checkpoint.weights_sha256()


def test_a_draft_is_refused_without_the_plugin(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(models("llama")))
    folder = draft_folder(checkpoint, pruning(checkpoint.path, (2, 5)), tmp_path / "drafts")
    draft = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 3}
    whole = {**draft, "draft_load_config": {"load_format": FORMAT}}
    dense = Case("llama", ())
    jobs = [
        dense.job(checkpoint.path, speculative_config=whole, config_format=FORMAT),
        dense.job(checkpoint.path, speculative_config=whole),
        dense.job(folder),
    ]
    results = run_jobs(jobs, tmp_path, VLLM_PLUGINS="none")
    assert "Unknown config format `sleb`" in results[0]["error"]
    assert "['SlebLlamaForCausalLM'] are not supported" in results[1]["error"]
    assert "['SlebLlamaForCausalLM'] are not supported" in results[2]["error"]
