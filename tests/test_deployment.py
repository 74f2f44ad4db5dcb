"""A pruned model in each serving mode, on real engines."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import checkpoints
import oracle
from conftest import Models
from engines import NEW_TOKENS, PROMPTS, Case, check_equal, check_greedy, run_jobs
from exports import manifest_for
from running import LOCAL, OPTIONS, ForkedServer, printed_command
from sleb_bench.server import free_port
from sleb_serve.protocol import READER_KEY

pytest.importorskip("vllm")

REMOVED = (2, 5)
CASE = Case("llama", REMOVED)
LONG = [[1, *range(40, 130)], [1, *range(40, 130), 7]]
Results = dict[str, dict[str, Any]]


def reader(name: str) -> dict[str, Any]:
    """What reads the files for the plugin's loader."""
    return {"model_loader_extra_config": {READER_KEY: name}}


@pytest.fixture(scope="module")
def jobs(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Every form that one process without ranks can run, by name."""
    folder, path = tmp_path_factory.mktemp("forms"), models("llama")

    def job(**engine: Any) -> dict[str, Any]:
        return CASE.job(path, **engine)

    def refused(**engine: Any) -> dict[str, Any]:
        return {**job(**engine), "only_configure": True}

    twice = {"prompts": LONG, "again": 1, "no_logprobs": True}
    connector = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder / "kv")},
    }
    adapter = str(checkpoints.lora(path, folder / "lora"))
    shared = {"enable_eplb": True, "enable_expert_parallel": True, "tensor_parallel_size": 2}
    return {
        "chunked prefill": job(max_num_batched_tokens=16, **reader("safetensors")),
        "eager reader": job(safetensors_load_strategy="eager"),
        "many readers": job(model_loader_extra_config={"enable_multithread_load": True}),
        "kv transfer": {**job(kv_transfer_config=connector, block_size=32), **twice},
        "prefix caching": {**job(enable_prefix_caching=True, block_size=32), **twice},
        "structured": {**job(), "structured": {"regex": "(yes|no)+"}, "no_logprobs": True},
        "reload": {**job(), "reload": True},
        "dummy": job(**reader("dummy")),
        # vLLM's LoRA on a CPU fails on prompt log-probabilities, dense as well.
        "lora": {**job(enable_lora=True, max_lora_rank=8), "lora": adapter, "no_logprobs": True},
        "sleep": refused(enable_sleep_mode=True),
        "sharded_state": job(load_format="sharded_state"),
        "mistral": job(load_format="mistral"),
        "another reader": job(**reader("tensorizer")),
        "expert balancing": refused(**shared),
        "transformers": job(model_impl="transformers"),
    }


@pytest.fixture(scope="module")
def results(jobs: Results, tmp_path_factory: pytest.TempPathFactory) -> Results:
    found = run_jobs(list(jobs.values()), tmp_path_factory.mktemp("results"))
    return dict(zip(jobs, found, strict=True))


@pytest.mark.parametrize(
    "form", ["chunked prefill", "reload", "eager reader", "many readers", "transformers"]
)
def test_equal_to_transformers_with_the_blocks_deleted(
    form: str, results: Results, models: Models
) -> None:
    check_equal(results[form], models("llama"), CASE)


def test_prefixes_are_cached_and_answers_stay(results: Results, models: Models) -> None:
    check_greedy(results["prefix caching"], oracle.pruned(models("llama"), REMOVED), LONG)
    assert min(results["prefix caching"]["cached"]) >= 64


def test_caches_that_go_through_a_connector_are_the_shorter_models(
    results: Results, jobs: Results, models: Models
) -> None:
    """A connector counts the layers in the config: one file for each that is left."""
    check_greedy(results["kv transfer"], oracle.pruned(models("llama"), REMOVED), LONG)
    config = jobs["kv transfer"]["engine"]["kv_transfer_config"]["kv_connector_extra_config"]
    stored = Path(config["shared_storage_path"])
    layers = {file.name.split(".")[2] for file in stored.rglob("*.safetensors")}
    assert {int(layer) for layer in layers} == set(range(6))


def test_structured_outputs_keep_to_their_form(results: Results, models: Models) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models("llama"))
    model = oracle.pruned(models("llama"), REMOVED)
    for prompt, tokens in zip(PROMPTS, results["structured"]["tokens"], strict=True):
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        # The last word may be cut off by the token limit.
        assert re.match(r"(yes|no)+", text), text
        free = oracle.greedy(model, prompt, NEW_TOKENS)
        assert not re.match(r"(yes|no)+", tokenizer.decode(free))


def test_an_adapter_trained_on_the_dense_model_applies_to_the_layers_that_are_left(
    results: Results, jobs: Results, models: Models
) -> None:
    path = models("llama")
    whole = checkpoints.merge_lora(oracle.load(path), Path(jobs["lora"]["lora"]))
    check_greedy(results["lora"], oracle.delete_blocks(whole, REMOVED), PROMPTS)
    plain = oracle.greedy(oracle.pruned(path, REMOVED), PROMPTS[0], NEW_TOKENS)
    assert results["lora"]["tokens"][0] != plain


def test_dummy_weights_make_the_same_shape(results: Results) -> None:
    (dummy,), (real,) = results["dummy"]["ranks"], results["chunked prefill"]["ranks"]
    assert dummy["layers"] == real["layers"]
    assert dummy["kv_cache_layers"] == real["kv_cache_layers"]


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
def test_what_cannot_be_served_is_refused(form: str, message: str, results: Results) -> None:
    assert message in results[form].get("error", "accepted")


@pytest.mark.slow
def test_two_replicas_behind_one_address_serve_the_pruned_model(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openai = pytest.importorskip("openai")
    path = models("llama")
    manifest = manifest_for(path, REMOVED)
    manifest.write(tmp_path / "m.json")
    port = free_port()
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    command = printed_command(
        path, tmp_path / "m.json", *OPTIONS, "--data-parallel-size", "2", *LOCAL, str(port)
    )
    server = ForkedServer(command, port, tmp_path / "server.log")
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
    greedy = oracle.greedy(oracle.pruned(path, REMOVED), PROMPTS[0], NEW_TOKENS)
    assert answers == [greedy] * 4
    assert server.log.read_text().count("6 of 8 decoder layers built") == 2
