"""The command line: one-line errors, exit codes, no half-written files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import oracle
from commands import (
    Capture,
    one_thread,
    refused,
    run_in_one,
    run_with_one_thread,
    select_arguments,
)
from conftest import ROOT, Models
from forking import start_fork
from sleb_serve.cli.main import main
from sleb_serve.manifest.reader import read_manifest


def test_select_writes_a_manifest_that_equals_the_naive_search(
    models: Models, tmp_path: Path, capsys: Capture
) -> None:
    from sleb_serve.checkpoint.hub import open_checkpoint
    from sleb_serve.data.calibration import make_sequences
    from sleb_serve.data.tokenizer import load_tokenizer

    output = tmp_path / "m.json"
    assert main(select_arguments(models("llama"), output, "--remove", "3")) == 0
    assert "3 of 8 blocks (37.5 %)" in capsys.readouterr().out
    manifest = read_manifest(output)
    checkpoint = open_checkpoint(str(models("llama")))
    sequences = make_sequences(
        "python-docs", load_tokenizer(checkpoint), sequences=2, sequence_length=32
    ).tokens
    naive = oracle.naive_search(models("llama"), sequences, 3)
    assert manifest.blocks == tuple(block for block, _ in naive)
    assert [r.loss for r in manifest.removed] == pytest.approx(
        [min(losses.values()) for _, losses in naive], rel=1e-5
    )
    dense = oracle.loss(oracle.load(models("llama")), sequences)
    assert manifest.dense_loss == pytest.approx(dense, rel=1e-5)
    log = [json.loads(line) for line in (tmp_path / "m.json.search.jsonl").open()]
    logged = {(e["step"], e["candidate"]): e["loss"] for e in log if "candidate" in e}
    expected = {
        (n, b): loss for n, (_, losses) in enumerate(naive, 1) for b, loss in losses.items()
    }
    assert logged == pytest.approx(expected, rel=1e-5)


def test_show_prints_for_people_and_for_machines(
    models: Models, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "m.json"
    main(select_arguments(models("opt"), output))
    capsys.readouterr()
    assert main(["show", str(output)]) == 0
    assert "OPTForCausalLM, 6 blocks" in capsys.readouterr().out
    assert main(["show", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(output.read_text())
    assert main(["show", str(output), "--json", "--blocks", "1"]) == 0
    assert len(json.loads(capsys.readouterr().out)["removed"]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--remove", "0"], "--remove 0"),
        (["--remove", "8"], "--remove 8: of 8 blocks at most 6"),
        (["--remove", "1.5"], "--remove 1.5"),
        (["--remove", "x"], "--remove x"),
        (["--calibration", "empty.txt"], "empty.txt is empty"),
        (["--calibration", "short.txt"], "less than one sequence of 32"),
        (["--calibration", "nowhere.txt"], "cannot read text nowhere.txt"),
        (["--sequence-length", "100000"], "more than the model's context of 512"),
        (["--sequence-length", "1"], "at least 2 tokens"),
        (["--sequences", "-1"], "at least one sequence is needed"),
        (["--dtype", "int8"], "invalid choice"),
        (["--early-barrier", "-1"], "0 or more"),
        (["--output", "no-such-folder/m.json"], "there is no folder no-such-folder"),
        (["--output", "."], "it is a folder"),
        (["--surprise"], "unrecognized arguments"),
        (["--remov", "2"], "unrecognized arguments"),
    ],
)
def test_bad_options_of_select_are_refused_and_nothing_is_written(
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("a few words")
    before = sorted(path.name for path in tmp_path.iterdir())
    line = refused(select_arguments(models("llama"), tmp_path / "m.json", *options), capsys)
    assert message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_models_that_are_none_are_refused(models: Models, tmp_path: Path, capsys: Capture) -> None:
    def select(model: object) -> str:
        return refused(select_arguments(Path(str(model)), tmp_path / "m.json"), capsys)

    assert "no such model" in select("/no/such/model")
    assert "no such model" in select("org/nothing-of-that-name")
    translator = tmp_path / "translator"
    translator.mkdir()
    for values, message in (
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "T5For"),
        ({"architectures": ["NoSuchForCausalLM"]}, "NoSuchForCausalLM"),
    ):
        config = {"num_hidden_layers": 4, "model_type": "other", **values}
        (translator / "config.json").write_text(json.dumps(config))
        assert f"can prune: its architecture is {message}" in select(translator)
    broken = shutil.copytree(models("llama"), tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\x00" * 100)
    assert "broken" in select(broken)
    (broken / "model.safetensors").unlink()
    assert "holds no weights" in select(broken)
    assert not list(tmp_path.glob("m.json*"))


def test_weights_that_are_not_numbers_are_refused(
    models: Models, tmp_path: Path, capsys: Capture
) -> None:
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(models("llama"), tmp_path / "nan")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.4.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    line = refused(select_arguments(broken, tmp_path / "m.json"), capsys)
    assert "is nan" in line
    assert not (tmp_path / "m.json").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text[: len(text) // 2], "not JSON"),
        (lambda text: text.replace('"block": 2', '"block": 1'), "names block 1 twice"),
        (lambda text: text.replace('"block": 2', '"block": 99'), "between 0 and 5"),
        (lambda text: text.replace('"seed"', '"sneed"'), "unknown key 'sneed'"),
        (lambda text: text + " " * (5 << 20), "larger than 1048576 bytes"),
    ],
)
@pytest.mark.parametrize("command", ["show", "serve", "bench"])
def test_bad_manifests_are_refused_by_every_reader(
    models: Models,
    tmp_path: Path,
    capsys: Capture,
    command: str,
    edit: Callable[[str], str],
    message: str,
) -> None:
    value = {
        "schema_version": 1,
        "model": {
            "id": "x",
            "revision": None,
            "architecture": "OPTForCausalLM",
            "num_blocks": 6,
            "config_sha256": "0" * 64,
            "weights_sha256": "0" * 64,
        },
        "removed": [{"block": 1}, {"block": 2}],
        "calibration": {
            "source": "a",
            "split": None,
            "sequences": 1,
            "sequence_length": 2,
            "seed": 0,
            "tokens_sha256": "0" * 64,
        },
    }
    path = tmp_path / "m.json"
    path.write_text(edit(json.dumps(value)))
    arguments = {
        "show": ["show", str(path)],
        "serve": ["serve", str(models("opt")), "-m", str(path)],
        "bench": ["bench", str(models("opt")), "-m", str(path), "-o", str(tmp_path / "out")],
    }
    line = refused(arguments[command], capsys)
    assert message in line
    assert str(path) in line
    assert not (tmp_path / "out").exists()


def test_a_manifest_that_is_not_there_is_refused(capsys: Capture) -> None:
    assert "cannot read manifest nowhere.json: No such file" in refused(
        ["show", "nowhere.json"], capsys
    )


def test_usage_errors_are_one_line(capsys: Capture) -> None:
    for arguments in ("", "nonsense", "select", "serve", "serve model", "serve -m m.json", "bench"):
        refused(arguments.split(), capsys)


def test_the_architectures_are_listed_with_their_status(capsys: Capture) -> None:
    assert main(["architectures"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == sorted(lines)
    assert "LlamaForCausalLM proven" in {" ".join(line.split()) for line in lines}
    assert main(["architectures", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["GPT2LMHeadModel"] == {"status": "proven"}
    assert listed["JambaForCausalLM"]["status"] == "refused"
    assert "by periods alone" in listed["JambaForCausalLM"]["reason"]
    assert listed["KimiLinearForCausalLM"]["status"] == "expected"


def test_the_documentation_has_the_table_of_architectures(capsys: Capture) -> None:
    assert main(["architectures", "--markdown"]) == 0
    page = ROOT / "docs" / "reference" / "architectures.md"
    assert capsys.readouterr().out in page.read_text(encoding="utf-8")


def test_help_has_examples(capsys: Capture) -> None:
    for command in ("select", "serve", "bench", "eval", "export", "import"):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
        assert "examples:" in capsys.readouterr().out


def test_a_killed_search_resumes_to_the_same_bytes(
    models: Models, tmp_path: Path, capsys: Capture
) -> None:
    """Sequences are made long, so that a step takes seconds and a kill lands inside one."""
    options = ["--remove", "5", "--sequences", "12", "--sequence-length", "512"]
    whole, killed = tmp_path / "whole.json", tmp_path / "killed.json"
    with one_thread():
        assert main(select_arguments(models("llama"), whole, *options)) == 0

    log = tmp_path / "killed.json.search.jsonl"
    arguments = select_arguments(models("llama"), killed, *options)
    process = start_fork(run_with_one_thread, tmp_path / "output", arguments)
    assert process.pid is not None
    while not (log.exists() and b'"step": 2, "removed"' in log.read_bytes()):
        assert process.is_alive()
        time.sleep(0.01)
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    finished = log.read_bytes()
    steps = finished.count(b'"removed"')
    assert 2 <= steps < 5
    assert not killed.exists()

    capsys.readouterr()
    with one_thread():
        assert main([*arguments, "--resume"]) == 0
    error = capsys.readouterr().err
    assert killed.read_bytes() == whole.read_bytes()
    assert log.read_bytes().startswith(finished)
    assert log.read_bytes() == (tmp_path / "whole.json.search.jsonl").read_bytes()
    assert error.count("(resumed)") == steps
    # Each computed step has a progress bar; those of the finished ones must not come again.
    assert [f"step {n}: " in error.replace(f"step {n}: block", "") for n in range(1, 6)] == [
        n > steps for n in range(1, 6)
    ]


def test_a_torn_log_is_mended_and_a_foreign_one_refused(
    models: Models, tmp_path: Path, capsys: Capture
) -> None:
    output, log = tmp_path / "m.json", tmp_path / "m.json.search.jsonl"
    arguments = select_arguments(models("llama"), output, "--remove", "3")
    main(arguments)
    manifest, whole = output.read_bytes(), log.read_bytes()
    for cut in (len(whole) - 20, len(whole) // 2, 30, 0):
        output.unlink()
        log.write_bytes(whole[:cut])
        assert main([*arguments, "--resume"]) == 0
        assert output.read_bytes() == manifest
        assert log.read_bytes() == whole
    capsys.readouterr()
    line = refused([*arguments, "--resume", "--sequences", "3"], capsys)
    assert "another search, whose calibration.sequences was 2, not 3" in line
    assert log.read_bytes() == whole
    log.write_bytes(whole.replace(b'"loss": ', b'"loss": x', 1))
    assert "line 3 cannot be resumed from" in refused([*arguments, "--resume"], capsys)


def test_resuming_can_go_further(models: Models, tmp_path: Path) -> None:
    output = tmp_path / "m.json"
    main(select_arguments(models("llama"), output, "--remove", "2"))
    main(select_arguments(models("llama"), output, "--remove", "4", "--resume"))
    main(select_arguments(models("llama"), tmp_path / "whole.json", "--remove", "4"))
    assert output.read_bytes() == (tmp_path / "whole.json").read_bytes()


@pytest.mark.parametrize(
    "script",
    [
        "import sleb_serve.cli.main, sleb_serve.evaluation.report, sleb_serve.serving.command",
        "import sleb_serve.selection.pipeline, sleb_serve.selection.search",
        "import sleb_serve.manifest.schema, sleb_serve.checkpoint.checkpoint",
        "import sleb_vllm, sleb_serve.compat.architectures, sleb_serve.cut.servable",
        "import sleb_bench.run, sleb_bench.report, sleb_bench.engine",
    ],
)
def test_importing_the_packages_imports_nothing_heavy(script: str) -> None:
    check = (
        "import sys; heavy = {'torch', 'vllm', 'transformers', 'datasets', 'accelerate'} & "
        "set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", f"{script}\n{check}"], check=True, cwd=ROOT)


def test_a_hub_model_is_bound_by_its_id_and_commit(models: Models, tmp_path: Path) -> None:
    """From a cache laid out as the hub library does; in a process, which reads where it lies."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = tmp_path / "cache" / "models--org--tiny"
    shutil.copytree(models("opt"), root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    output = tmp_path / "m.json"
    select = select_arguments(Path("org/tiny"), output)
    serve, other = (
        ["serve", str(model), "-m", str(output), "--dry-run"]
        for model in ("org/tiny", models("opt"))
    )
    selected, served, folder = run_in_one(
        [select, serve, other],
        tmp_path / "run",
        HF_HUB_CACHE=str(tmp_path / "cache"),
        HF_HUB_OFFLINE="1",
    )
    assert selected.code == 0, selected.error
    model = read_manifest(output).model
    assert (model.id, model.revision) == ("org/tiny", commit)
    assert served.code == 0, served.error
    assert f"--served-model-name org/tiny-{read_manifest(output).pruning().tag}" in served.out
    assert folder.code == 0, "the same weights from a folder are the same model"
