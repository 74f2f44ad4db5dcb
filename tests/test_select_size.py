"""Selection with little memory, and by several processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from commands import one_thread, run_in_two
from conftest import Models, save_model
from forking import run_fork
from memory import measure_memory
from sleb_serve.cli.main import main

WIDE: dict[str, Any] = {"vocab_size": 384, "hidden_size": 512, "num_attention_heads": 8}
LARGE = ["--sequences", "2", "--sequence-length", "2048"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 30 MB whose states over 2,048 tokens have 4 MB each."""
    folder = tmp_path_factory.mktemp("wide")
    shape: dict[str, Any] = {
        "num_hidden_layers": 7,
        "intermediate_size": 256,
        "max_position_embeddings": 2048,
    }
    save_model("llama", folder, **WIDE, **shape, num_key_value_heads=2)
    return folder


@pytest.fixture(scope="module")
def unlimited(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest that is selected where memory is plenty."""
    output = tmp_path_factory.mktemp("unlimited") / "m.json"
    assert main(select(wide, output, *LARGE)) == 0
    return output


def select(model: Path, output: Path, *more: str) -> list[str]:
    command = ["select", str(model), "-o", str(output), "--calibration", "python-docs"]
    return [*command, "--remove", "2", *more]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("budget", "way"), [("212M", "in memory"), ("172M", "from disk")])
def test_memory_stays_within_the_budget(
    wide: Path, unlimited: Path, models: Models, tmp_path: Path, budget: str, way: str
) -> None:
    small = ["--sequences", "2", "--sequence-length", "64"]
    commands = [
        select(models("llama"), tmp_path / "small.json", *small, "--memory-budget", "64M"),
        select(wide, tmp_path / "m.json", *LARGE, "--memory-budget", budget),
    ]
    log = tmp_path / "log"
    code = run_fork(measure_memory, log, *commands, tmp_path / "peak")
    assert code == 0, log.read_text()[-3000:]
    assert way in log.read_text()
    assert int((tmp_path / "peak").read_text()) >> 20 <= int(budget[:-1])
    assert (tmp_path / "m.json").read_bytes() == unlimited.read_bytes()


def test_a_budget_that_cannot_do_is_refused(
    wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = select(wide, tmp_path / "m.json", "--memory-budget", "20M")
    assert main([*arguments, "--sequence-length", "2048"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--memory-budget 20.0 MiB is too small" in line
    assert not (tmp_path / "m.json").exists()


def test_two_processes_give_the_bytes_of_one(models: Models, tmp_path: Path) -> None:
    def command(search: str, count: str) -> list[str]:
        text = ["--sequences", "5", "--sequence-length", "64", "--search", search]
        return select(models("llama"), tmp_path / f"{search}-{count}.json", *text)

    searches = ("greedy", "fast")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2"]
    commands = [command(search, "two") for search in searches]
    first, second = run_in_two(commands, tmp_path / "two", launcher, OMP_NUM_THREADS="1")
    with one_thread():
        assert [main(command(search, "one")) for search in searches] == [0, 0]
    for search, told, quiet in zip(searches, first, second, strict=True):
        assert (told.code, quiet.code) == (0, 0)
        assert "one of 2 processes" in told.error
        assert told.out.count("wrote ") == 1
        assert "wrote " not in quiet.out
        for end in ("json", "json.search.jsonl"):
            one, two = (tmp_path / f"{search}-{count}.{end}" for count in ("one", "two"))
            assert one.read_bytes() == two.read_bytes()


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 115 MB in bfloat16, which does not fit 250 MiB in float32."""
    folder = tmp_path_factory.mktemp("half")
    shape: dict[str, Any] = {
        "num_hidden_layers": 8,
        "intermediate_size": 4096,
        "max_position_embeddings": 64,
    }
    save_model("llama", folder, "bfloat16", **WIDE, **shape, num_key_value_heads=8)
    return folder


@pytest.mark.parametrize(
    ("hardware", "budget", "dtype"),
    [(True, "1G", "bfloat16"), (False, "1G", "float32"), (False, "250M", "bfloat16")],
)
def test_a_dtype_that_would_be_emulated_is_computed_in_float32_where_that_fits(
    half: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hardware: bool,
    budget: str,
    dtype: str,
) -> None:
    monkeypatch.setattr("sleb_serve.selection.scorer.has_fast", lambda dtype: hardware)
    options = ["--sequences", "2", "--sequence-length", "16", "--memory-budget", budget]
    for name, more in (("auto", []), ("asked", ["--dtype", dtype])):
        assert main(select(half, tmp_path / f"{name}.json", *options, *more)) == 0
    found = (tmp_path / "auto.json").read_bytes()
    assert json.loads(found)["selection"]["dtype"] == dtype
    assert found == (tmp_path / "asked.json").read_bytes()
