"""A real server with the pruned model: its answers and its reports."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

import oracle
from conftest import ROOT, Models

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")
sys.path.insert(0, str(ROOT / "benchmarks" / "load"))

from endpoint_load import stream_and_ask  # noqa: E402

from commands import command_line  # noqa: E402
from running import LOCAL, OPTIONS, ForkedServer, printed_command, selected  # noqa: E402
from sleb_bench.server import Server, free_port  # noqa: E402
from sleb_serve.cli.main import main  # noqa: E402
from sleb_serve.errors import SlebError  # noqa: E402
from sleb_serve.manifest.reader import read_manifest  # noqa: E402


@pytest.fixture(scope="module")
def manifest(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return selected(models("llama"), tmp_path_factory.mktemp("manifest"))


@dataclass(frozen=True)
class Running:
    url: str
    name: str


@pytest.fixture(scope="module")
def server(
    models: Models, manifest: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """One server for all questions, started by `sleb-serve serve`."""
    port = free_port()
    command = command_line("serve", str(models("llama")), "-m", str(manifest), *OPTIONS)
    log = tmp_path_factory.mktemp("server") / "server.log"
    running = Server([*command, *LOCAL, str(port)], port, log)
    try:
        running.wait(300)
        pruning = read_manifest(manifest).pruning()
        yield Running(running.url, f"llama-{pruning.tag}")
        running.process.terminate()
        assert running.process.wait(60) == 0
    except SlebError:
        pytest.fail(log.read_text()[-4000:])
    finally:
        running.stop()


def test_the_server_names_the_pruned_model(server: Running) -> None:
    listed = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none").models.list().data
    assert [model.id for model in listed] == [server.name]


def test_openai_streams_what_the_pruned_model_says(
    server: Running, models: Models, manifest: Path
) -> None:
    from transformers import AutoTokenizer

    question = [{"role": "user", "content": "Why is the sky blue?"}]
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    stream = client.chat.completions.create(
        model=server.name, messages=question, max_tokens=16, temperature=0, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(pieces) > 2

    tokenizer = AutoTokenizer.from_pretrained(models("llama"))
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    model = oracle.pruned(models("llama"), read_manifest(manifest).blocks)
    answer = oracle.greedy(model, prompt, 16)
    if 2 in answer:  # the end-of-text token ends the answer
        answer = answer[: answer.index(2)]
    assert "".join(pieces) == tokenizer.decode(answer, skip_special_tokens=True)


def test_curl_streams_a_chat_completion(server: Running) -> None:
    body = {
        "model": server.name,
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 8,
        "stream": True,
    }
    done = subprocess.run(
        ["curl", "-sSN", f"{server.url}/v1/chat/completions", "-d", json.dumps(body)]
        + ["-H", "Content-Type: application/json"],
        capture_output=True,
        text=True,
        check=True,
    )
    events = [line[6:] for line in done.stdout.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert {json.loads(event)["model"] for event in events[:-1]} == {server.name}


def test_the_server_tells_what_it_serves(server: Running, models: Models, manifest: Path) -> None:
    reply = urllib.request.urlopen(f"{server.url}/sleb/manifest", timeout=10)
    told = json.load(reply)
    read = read_manifest(manifest)
    pruning = read.pruning()
    assert (told["digest"], told["tag"]) == (pruning.digest, pruning.tag)
    assert told["pruning"] == pruning.to_dict()
    assert told["served_model_name"] == [server.name]
    (rank,) = told["ranks"]
    assert rank["layers"] == sorted(set(range(8)) - set(read.blocks))
    kept = oracle.parameter_counts(oracle.pruned(models("llama"), read.blocks))[0]
    assert rank["parameters"] == kept
    dense = sum(file.stat().st_size for file in models("llama").glob("*.safetensors"))
    assert 0 < rank["weights_skipped_bytes"] < dense


def sleb_metrics(url: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """The manifest's metrics, of which there must be one series each."""
    from prometheus_client.parser import text_string_to_metric_families

    text = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("sleb_serve_"):
                found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def test_the_manifest_is_in_the_servers_metrics(
    server: Running, models: Models, manifest: Path
) -> None:
    pruning = read_manifest(manifest).pruning()
    weights = load_file(models("llama") / "model.safetensors")
    skipped = sum(
        tensor.nbytes
        for name, tensor in weights.items()
        if any(f".layers.{block}." in name for block in pruning.removed)
    )
    own = {"model_name": server.name}
    assert sleb_metrics(server.url) == {
        "sleb_serve_manifest_info": [({**own, "digest": pruning.digest, "tag": pruning.tag}, 1)],
        "sleb_serve_blocks_removed": [(own, 3)],
        "sleb_serve_blocks_loaded": [(own, 5)],
        "sleb_serve_weights_skipped_bytes": [(own, skipped)],
    }


def test_no_path_of_this_machine_is_told(server: Running, models: Models, manifest: Path) -> None:
    texts = [
        urllib.request.urlopen(f"{server.url}{path}", timeout=10).read().decode()
        for path in ("/sleb/manifest", "/metrics")
    ]
    own = [line for line in texts[1].splitlines() if not line.startswith("#")]
    places = (models("llama"), models("llama").parent, manifest, Path.home(), Path.cwd())
    for place in places:
        assert str(place) not in texts[0]
        assert not [line for line in own if str(place) in line]
    assert "/" not in texts[0]


def test_a_thousand_requests_at_once_leave_a_stream_as_it_is(server: Running) -> None:
    path = "/sleb/manifest"
    alone, none = asyncio.run(stream_and_ask(server.url, server.name, path, 0))
    beside, answers = asyncio.run(stream_and_ask(server.url, server.name, path, 1000))
    assert none == []
    assert alone.tokens == beside.tokens == 96
    assert beside.text == alone.text
    assert len(answers) == 1000
    (answer,) = set(answers)
    assert answer[0] == 200
    assert json.loads(answer[1])["served_model_name"] == [server.name]


@pytest.mark.slow
def test_several_api_servers_tell_the_same(
    models: Models, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    options = [*OPTIONS, "--api-server-count", "2", "--root-path", "/proxy", *LOCAL, str(port)]
    command = printed_command(models("llama"), manifest, *options)
    server = ForkedServer(command, port, tmp_path / "log", {"VLLM_API_KEY": "a key"})
    pruning = read_manifest(manifest).pruning()
    try:
        server.wait(300)
        # Whichever of them answers.
        for prefix in ("", "/proxy") * 3:
            url = f"{server.url}{prefix}/sleb/manifest"
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(url, timeout=10)
            asked = urllib.request.Request(url, headers={"Authorization": "Bearer a key"})
            told = json.load(urllib.request.urlopen(asked, timeout=10))
            assert told["digest"] == pruning.digest
            monkeypatch.setenv("VLLM_API_KEY", "another")
            assert main(["probe", f"{server.url}{prefix}", "-m", str(manifest)]) == 1
            monkeypatch.setenv("VLLM_API_KEY", "a key")
            assert main(["probe", f"{server.url}{prefix}", "-m", str(manifest)]) == 0
            metrics = sleb_metrics(server.url)
            assert {name: [value for _, value in found] for name, found in metrics.items()} == {
                "sleb_serve_manifest_info": [1],
                "sleb_serve_blocks_removed": [3],
                "sleb_serve_blocks_loaded": [5],
                "sleb_serve_weights_skipped_bytes": [
                    metrics["sleb_serve_weights_skipped_bytes"][0][1]
                ],
            }
    finally:
        server.stop()
