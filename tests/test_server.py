"""A real server with the pruned model, and the ways in which it must refuse to be one."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import oracle
from conftest import ROOT

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")

from sleb_bench.server import Server, free_port  # noqa: E402
from sleb_serve.checkpoint.hub import open_checkpoint  # noqa: E402
from sleb_serve.cli.main import main  # noqa: E402
from sleb_serve.errors import SlebError  # noqa: E402
from sleb_serve.manifest.reader import read_manifest  # noqa: E402
from sleb_serve.serving.command import serve_command  # noqa: E402
from sleb_serve.serving.speculative import draft_folder  # noqa: E402

Models = Callable[[str], Path]

OPTIONS = ["--enforce-eager", "--max-model-len", "256", "--dtype", "float32"]


@pytest.fixture(scope="module")
def manifest(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("manifest") / "m.json"
    arguments = ["select", str(models("llama")), "-o", str(output), "--remove", "3"]
    text = ["--calibration", "python-docs", "--sequences", "2", "--sequence-length", "32"]
    assert main([*arguments, *text]) == 0
    return output


def sleb_serve(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "sleb_serve.cli", *arguments]


def printed_command(model: Path, manifest: Path, *options: str) -> list[str]:
    """What --dry-run prints as its last line, split as a shell would."""
    done = subprocess.run(
        sleb_serve("serve", str(model), "-m", str(manifest), *options, "--dry-run"),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return shlex.split(done.stdout.splitlines()[-1])


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
    command = sleb_serve("serve", str(models("llama")), "-m", str(manifest), *OPTIONS)
    log = tmp_path_factory.mktemp("server") / "server.log"
    running = Server([*command, "--host", "127.0.0.1", "--port", str(port)], port, log)
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


def test_several_api_servers_tell_the_same(models: Models, manifest: Path, tmp_path: Path) -> None:
    port = free_port()
    command = sleb_serve("serve", str(models("llama")), "-m", str(manifest), *OPTIONS)
    options = ["--api-server-count", "2", "--host", "127.0.0.1", "--port", str(port)]
    server = Server([*command, *options], port, tmp_path / "log")
    pruning = read_manifest(manifest).pruning()
    try:
        server.wait(300)
        # Whichever of them answers.
        for _ in range(6):
            told = json.load(urllib.request.urlopen(f"{server.url}/sleb/manifest", timeout=10))
            assert told["digest"] == pruning.digest
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


def run_until_end(command: list[str], port: int, log: Path, **environment: str) -> tuple[int, str]:
    """Run a server that must not start; its exit code and output, no port ever having answered."""
    answered = False
    deadline = time.monotonic() + 300
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )
        while process.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                answered |= probe.connect_ex(("127.0.0.1", port)) == 0
            time.sleep(0.05)
        process.kill()
        process.wait()
    assert not answered
    return process.returncode, log.read_text()


def without(command: list[str], *options: str) -> list[str]:
    """A command less some options and their values."""
    rest: list[str] = []
    for number, part in enumerate(command):
        if part not in options and command[max(0, number - 1)] not in options:
            rest.append(part)
    return rest


def with_value(command: list[str], option: str, change: Callable[[str], str]) -> list[str]:
    at = command.index(option) + 1
    return [*command[:at], change(command[at]), *command[at + 1 :]]


def edited(**changes: Any) -> Callable[[list[str]], list[str]]:
    """Changes what the overrides hold of the manifest."""

    def edit(text: str) -> str:
        overrides = json.loads(text)
        overrides["sleb"][0] |= changes
        return json.dumps(overrides)

    return lambda command: with_value(command, "--hf-overrides", edit)


def more_overrides(**more: Any) -> Callable[[list[str]], list[str]]:
    return lambda command: with_value(
        command, "--hf-overrides", lambda text: json.dumps({**json.loads(text), **more})
    )


def same(command: list[str]) -> list[str]:
    return command


FORMATS = ("--load-format", "--config-format")
WAYS: dict[str, tuple[Callable[[list[str]], list[str]], dict[str, str], str]] = {
    "VLLM_PLUGINS=none": (same, {"VLLM_PLUGINS": "none"}, "Unknown config format `sleb`"),
    "VLLM_PLUGINS names another plugin": (
        same,
        {"VLLM_PLUGINS": "lora_filesystem_resolver"},
        "Unknown config format `sleb`",
    ),
    "no plugin, and neither format": (
        lambda command: without(command, *FORMATS),
        {"VLLM_PLUGINS": "none"},
        "['SlebLlamaForCausalLM'] are not supported for now",
    ),
    "neither format": (
        lambda command: without(command, *FORMATS),
        {},
        "['SlebLlamaForCausalLM'] are not supported for now",
    ),
    "overrides without --load-format": (
        lambda command: without(command, "--load-format"),
        {},
        "--load-format is auto, which loads dense ones",
    ),
    "another --load-format": (
        lambda command: with_value(command, "--load-format", lambda _: "safetensors"),
        {},
        "--load-format is safetensors, which loads dense ones",
    ),
    "overrides without --config-format": (
        lambda command: without(command, "--config-format"),
        {},
        "['SlebLlamaForCausalLM'] are not supported for now",
    ),
    "formats without overrides": (
        lambda command: without(command, "--hf-overrides"),
        {},
        "asked for without a manifest",
    ),
    "overrides edited: other blocks": (edited(removed=[1, 2, 3]), {}, "weights_sha256 expected"),
    "overrides edited: another model's digest": (
        edited(config_sha256="0" * 64),
        {},
        "config_sha256 expected 0000",
    ),
    "overrides that count other layers": (
        more_overrides(num_hidden_layers=4),
        {},
        "num_hidden_layers = 4 where the manifest leaves 5",
    ),
    "a draft's folder, without the plugin": (
        lambda command: [*command[: command.index("--model")], "--model", "{draft}", *OPTIONS],
        {"VLLM_PLUGINS": "none"},
        "['SlebLlamaForCausalLM'] are not supported for now",
    ),
    "a draft's folder, without the formats": (
        lambda command: [*command[: command.index("--model")], "--model", "{draft}", *OPTIONS],
        {},
        "['SlebLlamaForCausalLM'] are not supported for now",
    ),
    "two --model": (
        lambda command: [*command, "--model", "{opt}"],
        {},
        "architecture expected LlamaForCausalLM, found OPTForCausalLM",
    ),
}
"""Ways to ask for the pruned model wrongly, and what is said."""


@pytest.mark.slow
def test_no_way_to_ask_wrongly_ends_in_a_server_that_answers(
    models: Models, manifest: Path, tmp_path: Path
) -> None:
    port = free_port()
    options = [*OPTIONS, "--host", "127.0.0.1", "--port", str(port)]
    command = printed_command(models("llama"), manifest, *options)
    checkpoint = open_checkpoint(str(models("llama")))
    draft = draft_folder(checkpoint, read_manifest(manifest).pruning(), tmp_path)
    places = {"{opt}": str(models("opt")), "{draft}": str(draft)}
    rows = []
    for way, (change, environment, message) in WAYS.items():
        asked = [places.get(part, part) for part in change(command)]
        asked += ["--port", str(port)] if str(port) not in asked else []
        code, output = run_until_end(asked, port, tmp_path / "log", **environment)
        assert code > 0, way
        assert message in output, (way, output[-3000:])
        rows.append(f"| {way} | {code} | {message} |")
    if table := os.environ.get("SLEB_TEST_FAIL_CLOSED_TABLE"):
        head = ["| asked for with | exit code | the log says |", "|---|---|---|"]
        Path(table).write_text("\n".join([*head, *rows]) + "\n")


def test_sleb_serve_itself_refuses_a_disabled_plugin_and_another_model(
    models: Models, manifest: Path, tmp_path: Path
) -> None:
    port = free_port()
    for model, environment, message in (
        ("llama", {"VLLM_PLUGINS": "none"}, "VLLM_PLUGINS=none disables the plugin sleb"),
        ("opt", {}, "architecture expected LlamaForCausalLM, found OPTForCausalLM"),
    ):
        command = sleb_serve("serve", str(models(model)), "-m", str(manifest), *OPTIONS)
        code, output = run_until_end(
            [*command, "--port", str(port)], port, tmp_path / "log", **environment
        )
        assert code == 2
        assert message in output
        assert len(output.strip().splitlines()) == 1


def test_a_config_file_that_says_otherwise_does_not_count(
    models: Models, manifest: Path, tmp_path: Path
) -> None:
    """VLLM puts a file's options before those of the command line, of which the last counts."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    file = tmp_path / "config.yaml"
    file.write_text("load-format: auto\nconfig-format: hf\nhf-overrides: '{}'\nport: 1\n")
    command = printed_command(models("llama"), manifest, "--config", str(file))
    arguments = command[command.index("--model") :]
    parser = make_arg_parser(FlexibleArgumentParser())
    found = EngineArgs.from_cli_args(parser.parse_args(arguments))
    pruning = read_manifest(manifest).pruning()
    assert (found.load_format, found.config_format) == ("sleb", "sleb")
    assert found.hf_overrides["sleb"] == [pruning.to_dict()]
    assert found.model == str(models("llama"))


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["serve", *arguments]) == 2
    return capsys.readouterr().err


def test_options_that_would_undo_the_pruning_are_refused(
    models: Models, manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [str(models("llama")), "-m", str(manifest), "--dry-run"]
    for options, message in (
        (["--hf-overrides.rope_theta", "5"], "write overrides as one"),
        (["--hf_overrides.architectures", "[]"], "write overrides as one"),
        (["--hf-over", "{}"], "write overrides as one"),
        (["--hf-overrides", '{"architectures": ["LlamaForCausalLM"]}'], "set from the manifest"),
        (["--hf-overrides", "[1]"], "must be an object"),
        (["--hf-overrides"], "lacks its value"),
        (["--model", "other"], "--model is given twice"),
        (["--model=other"], "--model is given twice"),
        (["--config-format", "hf"], "--config-format is set from the manifest"),
        (["--load-format", "sharded_state"], "--load-format sharded_state reads other files"),
        (["--load_format=mistral"], "--load-format mistral reads other files"),
        (["--blocks", "4"], "K must be between 1 and 3"),
    ):
        assert message in refusal([*base, *options], capsys)


def test_the_printed_arguments_hold_the_users_and_the_manifests(
    models: Models, manifest: Path
) -> None:
    options = [
        "--port",
        "1",
        '--hf-overrides={"rope_theta": 5}',
        "--hf_overrides",
        '{"a": {"b": 1}}',
    ]
    command = printed_command(models("llama"), manifest, "--blocks", "2", *options)
    assert command[-2] == "--hf-overrides"
    overrides: dict[str, Any] = json.loads(command[-1])
    pruning = read_manifest(manifest).prefix(2).pruning()
    assert overrides == {
        "rope_theta": 5,
        "a": {"b": 1},
        "architectures": ["SlebLlamaForCausalLM"],
        "sleb": [pruning.to_dict()],
    }
    assert command.count("--hf-overrides") == 1
    for option in ("--load-format", "--config-format"):
        assert command[command.index(option) + 1] == "sleb"
        assert command.count(option) == 1
    more = ["--load-format=safetensors", "--model-loader-extra-config", '{"num_threads": 2}']
    read = printed_command(models("llama"), manifest, *more)
    assert read[read.index("--load-format") + 1] == "sleb"
    extra = json.loads(read[read.index("--model-loader-extra-config") + 1])
    assert extra == {"num_threads": 2, "reader": "safetensors"}
    assert command[command.index("--served-model-name") + 1] == f"llama-{pruning.tag}"
    named = printed_command(models("llama"), manifest, "--served-model-name", "mine")
    assert named.count("--served-model-name") == 1


def test_a_models_own_code_cannot_stand_in_for_the_plugin(
    models: Models, manifest: Path, tmp_path: Path
) -> None:
    """With auto_map left in place, vLLM without the plugin would fall back to the dense model."""
    import shutil

    from sleb_serve.checkpoint.hub import open_checkpoint
    from sleb_serve.serving.command import pruned_overrides

    model = shutil.copytree(models("llama"), tmp_path / "own-code")
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "own.Model"}
    (model / "config.json").write_text(json.dumps(config))
    pruning = read_manifest(manifest).pruning()
    assert pruned_overrides(pruning, open_checkpoint(str(model)))["auto_map"] is None


def test_the_vllm_command_is_used_where_it_works(
    models: Models, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sleb_serve.serving.command

    read = read_manifest(manifest)
    command = serve_command(str(models("llama")), read, ["--port", "1"])
    assert command[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model"] + [
        str(models("llama"))
    ]
    monkeypatch.setattr(sleb_serve.serving.command, "version", lambda name: "0.33.0")
    command = serve_command(str(models("llama")), read, ["--port", "1"])
    assert command[1:5] == ["serve", str(models("llama")), "--port", "1"]
    assert Path(command[0]).name == "vllm"
