"""The command of `serve`: keeps the user's options and the manifest's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from commands import Capture, refused
from conftest import Models
from running import printed_command, selected
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.cli.main import main
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.serving.command import pruned_overrides, serve_command

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def manifest(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return selected(models("llama"), tmp_path_factory.mktemp("manifest"))


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


OPTIONS = [
    *("--tensor-parallel-size", "2", "--max_model_len=128", "--enforce-eager", "--seed", "-1"),
    *("--no-enable-prefix-caching", "--load-format", "safetensors", "--dtype", "bfloat16"),
    *("--hf-overrides", '{"rope_theta": 5}', "--served-model-name", "one", "two"),
]


def printed(model: Path, manifest: Path, form: str, capsys: Capture, *options: str) -> str:
    arguments = ["serve", str(model), "-m", str(manifest), *options, "--dry-run", "--format", form]
    capsys.readouterr()
    assert main(arguments) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("options", [[], OPTIONS, ["--port", "8001", "--api-key", "0x10"]])
def test_vllm_reads_the_config_file_as_it_reads_the_command_line(
    models: Models, manifest: Path, tmp_path: Path, capsys: Capture, options: list[str]
) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    def read(arguments: list[str]) -> dict[str, Any]:
        parser = make_arg_parser(FlexibleArgumentParser())
        found = vars(parser.parse_args(arguments))
        return {name: value for name, value in found.items() if name != "config"}

    file = tmp_path / "serve.yaml"
    file.write_text(printed(models("llama"), manifest, "vllm-config", capsys, *options))
    assert file.read_text().startswith("# VLLM_PLUGINS=")
    command = printed_command(models("llama"), manifest, *options)
    expected = read(command[command.index("--model") :])
    assert read(["--config", str(file)]) == expected
    assert expected["hf_overrides"]["sleb"]


@pytest.mark.parametrize("options", [[], OPTIONS])
def test_the_yaml_gives_the_engine_what_the_command_line_gives_it(
    models: Models, manifest: Path, capsys: Capture, options: list[str]
) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    said = yaml.safe_load(printed(models("llama"), manifest, "yaml", capsys, *options))
    command = printed_command(models("llama"), manifest, *options)
    arguments = command[command.index("--model") :]
    parser = make_arg_parser(FlexibleArgumentParser())
    expected = AsyncEngineArgs.from_cli_args(parser.parse_args(arguments))
    ray = said["ray_serve_llm"]
    loading = ray["model_loading_config"]
    name = expected.served_model_name
    assert loading["model_id"] == (name[0] if isinstance(name, list) else name)
    found = AsyncEngineArgs(
        model=loading["model_source"], served_model_name=name, **ray["engine_kwargs"]
    )
    # Of what is not asked for, the command line and the class have defaults of their own.
    base = AsyncEngineArgs.from_cli_args(parser.parse_args(arguments[:2]))
    asked = {key for key, value in vars(expected).items() if value != getattr(base, key)}
    plain = AsyncEngineArgs(model=expected.model)
    assert {"hf_overrides", "load_format", "served_model_name"} <= asked
    for key in vars(expected):
        assert getattr(found, key) == getattr(expected if key in asked else plain, key), key
    assert said["kserve"]["args"] == arguments[1:]
    variables = ray["runtime_env"]["env_vars"]
    assert [{"name": "VLLM_PLUGINS", "value": variables["VLLM_PLUGINS"]}] == said["kserve"]["env"]


def test_json_holds_the_command_and_its_arguments_by_name(
    models: Models, manifest: Path, capsys: Capture
) -> None:
    found = json.loads(printed(models("llama"), manifest, "json", capsys, *OPTIONS))
    assert found["command"] == printed_command(models("llama"), manifest, *OPTIONS)
    assert "sleb" in found["environment"]["VLLM_PLUGINS"]
    assert found["arguments"]["max-model-len"] == "128"
    assert found["arguments"]["enforce-eager"] is True
    assert found["arguments"]["served-model-name"] == ["one", "two"]


def test_what_another_form_cannot_say_is_refused(
    models: Models, manifest: Path, capsys: Capture
) -> None:
    base = ["serve", str(models("llama")), "-m", str(manifest)]
    assert "--format needs --dry-run" in refused([*base, "--format", "json"], capsys)
    for options, message in (
        (["-tp", "2"], "-tp: write the option's long name"),
        (["--seed", "1", "--seed=2"], "--seed is given twice"),
        (["--config", "x.yaml"], "--config: give the file's options directly"),
        (["--api-key=-x"], "a value that begins with - cannot be written in vLLM's file"),
    ):
        asked = [*base, *options, "--dry-run", "--format", "vllm-config"]
        assert message in refused(asked, capsys)


def test_options_that_would_undo_the_pruning_are_refused(
    models: Models, manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["serve", str(models("llama")), "-m", str(manifest), "--dry-run"]
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
        assert message in refused([*base, *options], capsys)


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
