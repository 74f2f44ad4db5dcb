"""Selection where memory is short, and shared by processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import ROOT, save_model
from sleb_serve.cli.main import main

Models = Callable[[str], Path]

WIDE = {"vocab_size": 384, "hidden_size": 512, "num_attention_heads": 8}
LARGE = ["--sequences", "2", "--sequence-length", "2048"]

MEASURE = """
import json, sys
from pathlib import Path
from sleb_serve.cli.main import main

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

first, second = json.loads(sys.argv[1])
assert main(first) == 0  # what libraries load and allocate once
Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
before = status("VmRSS")
assert main(second) == 0
print(json.dumps(status("VmHWM") - before))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 30 MB whose states over 2,048 tokens have 4 MB each."""
    folder = tmp_path_factory.mktemp("wide")
    shape = {"num_hidden_layers": 7, "intermediate_size": 256, "max_position_embeddings": 2048}
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
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(commands)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert way in done.stderr
    peak = json.loads(done.stdout.splitlines()[-1]) >> 20
    assert peak <= int(budget[:-1])
    assert (tmp_path / "m.json").read_bytes() == unlimited.read_bytes()


def test_a_budget_that_cannot_do_is_refused(
    wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = select(wide, tmp_path / "m.json", "--memory-budget", "20M")
    assert main([*arguments, "--sequence-length", "2048"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--memory-budget 20.0 MiB is too small" in line
    assert not (tmp_path / "m.json").exists()


@pytest.mark.parametrize("search", ["greedy", "fast"])
def test_two_processes_give_the_bytes_of_one(models: Models, tmp_path: Path, search: str) -> None:
    text = ["--sequences", "5", "--sequence-length", "64", "--search", search]
    for launcher, name in (([], "one"), (["torch.distributed.run", "--nproc-per-node=2"], "two")):
        command = ["sleb_serve.cli", *select(models("llama"), tmp_path / f"{name}.json", *text)]
        started = [part for module in (launcher, command) if module for part in ("-m", *module)]
        done = subprocess.run(
            [sys.executable, *started],
            # The same number of threads, or sums differ in the last bit.
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("wrote ") == 1
    assert "one of 2 processes" in done.stderr
    for end in ("json", "json.search.jsonl"):
        one, two = (tmp_path / f"{name}.{end}" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 115 MB in bfloat16, which does not fit 250 MiB in float32."""
    folder = tmp_path_factory.mktemp("half")
    shape = {"num_hidden_layers": 8, "intermediate_size": 4096, "max_position_embeddings": 64}
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
