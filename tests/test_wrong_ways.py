"""Incorrect ways to start a pruned model: none leads to a running server."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commands import Capture, refused
from conftest import Models
from running import LOCAL, OPTIONS, printed_command, run_until_end, selected
from sleb_bench.server import free_port
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.serving.speculative import draft_folder

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def manifest(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = selected(models("llama"), tmp_path_factory.mktemp("manifest"))
    assert not set(read_manifest(output).blocks) & set(OTHERS)
    return output


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


OTHERS = [4, 5, 6]
"""Blocks that the manifest does not remove."""
FORMATS = ("--load-format", "--config-format")
CLASS = '{"LlamaForCausalLM": "vllm.model_executor.models.qwen2:Qwen2ForCausalLM"}'
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
        "given without a manifest",
    ),
    "overrides edited: other blocks": (edited(removed=OTHERS), {}, "weights_sha256 expected"),
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
    "formats, and overrides and --load-format undone": (
        lambda command: [*command, "--hf-overrides", "{}", "--load-format", "auto"],
        {},
        "--config-format sleb was given without a manifest",
    ),
    "formats, overrides undone, as a draft": (
        lambda command: [*command, "--hf-overrides", "{}", "--runner", "draft"],
        {},
        "--load-format sleb was given without a manifest",
    ),
    "all three undone, with the pruned model's name": (
        lambda command: [*without(command, *FORMATS, "--hf-overrides")],
        {},
        "is a pruned model's, and no manifest was given",
    ),
    "another class for the architecture": (
        lambda command: [*command, "--model-class-overrides", CLASS],
        {},
        "cannot be checked against the manifest",
    ),
    "two --model": (
        lambda command: [*command, "--model", "{opt}"],
        {},
        "architecture expected LlamaForCausalLM, found OPTForCausalLM",
    ),
}
"""Incorrect ways to start the pruned model, and their messages."""


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_no_way_to_ask_wrongly_ends_in_a_server_that_answers(
    way: str, models: Models, manifest: Path, tmp_path: Path
) -> None:
    change, environment, message = WAYS[way]
    port = free_port()
    command = printed_command(models("llama"), manifest, *OPTIONS, *LOCAL, str(port))
    checkpoint = open_checkpoint(str(models("llama")))
    draft = draft_folder(checkpoint, read_manifest(manifest).pruning(), tmp_path)
    places = {"{opt}": str(models("opt")), "{draft}": str(draft)}
    asked = [places.get(part, part) for part in change(command)]
    asked += ["--port", str(port)] if str(port) not in asked else []
    code, output = run_until_end(asked, port, tmp_path / "log", **environment)
    assert code > 0
    assert message in output, output[-3000:]
    if table := os.environ.get("SLEB_TEST_FAIL_CLOSED_TABLE"):
        _add_row(Path(table), f"| {way} | {code} | {message} |")


def _add_row(table: Path, row: str) -> None:
    head = "| asked for with | exit code | the log says |\n|---|---|---|\n"
    text = table.read_text() if table.exists() else head
    table.write_text(f"{text}{row}\n")


@pytest.mark.parametrize(
    ("model", "plugins", "message"),
    [
        ("llama", "none", "VLLM_PLUGINS=none disables the plugin sleb"),
        ("opt", "sleb", "architecture expected LlamaForCausalLM, found OPTForCausalLM"),
    ],
)
def test_sleb_serve_itself_refuses_a_disabled_plugin_and_another_model(
    models: Models,
    manifest: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    model: str,
    plugins: str,
    message: str,
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    # A server in this process's place would be none that a test can tell of.
    monkeypatch.setattr(os, "execvp", lambda *_: pytest.fail("a server was started"))
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("a server was started"))
    assert message in refused(["serve", str(models(model)), "-m", str(manifest), *OPTIONS], capsys)
