"""Checkpoints with a broken file: every command uses them or refuses them in one line."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from broken_checkpoints import config_cases, copy_with, index_cases, weight_cases
from commands import answered
from conftest import Models
from sleb_serve.cli.main import main

QUICK = 12
"""Cases of each kind that are tried each time, others each time."""

SLOW = {"config.json": 100, "model.safetensors": 300, "model.safetensors.index.json": 300}
"""The most that are tried where time is no matter."""

MOST = {"config.json": 0.9, "model.safetensors": 0.2, "model.safetensors.index.json": 0.35}
"""The share of a kind's cases that may be taken."""

Cases = Iterator[tuple[str, bytes]]


def of_config(model: Path) -> Cases:
    return config_cases(json.loads((model / "config.json").read_text()))


def of_weights(model: Path) -> Cases:
    return weight_cases(model / "model.safetensors")


def of_index(model: Path) -> Cases:
    return index_cases(model / "model.safetensors")


KINDS = {
    "config.json": of_config,
    "model.safetensors": of_weights,
    "model.safetensors.index.json": of_index,
}


def try_all(model: Path, folder: Path, name: str, cases: Cases) -> int:
    """Every command that reads a checkpoint, on each of some broken ones; how many were taken."""
    honest = folder / "honest.json"
    assert main(["import", str(model), "[1, 2]", "-o", str(honest)]) == 0
    taken = 0
    for case, content in cases:
        broken = copy_with(model, folder / "broken", name, content)
        if name.endswith("index.json"):
            (broken / "model.safetensors").rename(broken / "model-00001-of-00001.safetensors")
        bound = folder / "bound.json"
        bound.unlink(missing_ok=True)
        shutil.rmtree(folder / "exported", ignore_errors=True)
        code = answered("import", broken, "[1, 2]", "-o", bound).code
        assert code in (0, 2), case
        assert bound.exists() == (code == 0), case
        taken += code == 0
        manifest = bound if code == 0 else honest
        answered("check", broken, "-m", manifest, "--gpu", "A100-80G")
        answered("serve", str(broken), "-m", manifest, "--dry-run")
        answered("plan", broken)
        done = answered("export", broken, "-m", manifest, "-o", folder / "exported").code
        assert (folder / "exported").exists() == (done == 0), case
    assert not list(folder.glob(".*"))
    return taken


@pytest.mark.parametrize("name", KINDS)
def test_a_broken_file_is_refused_in_one_line(name: str, models: Models, tmp_path: Path) -> None:
    model = models("llama")
    cases = list(KINDS[name](model))
    try_all(model, tmp_path, name, iter(random.sample(cases, QUICK)))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_hundreds_of_broken_files_are_refused_in_one_line(
    name: str, models: Models, tmp_path: Path
) -> None:
    model = models("llama")
    cases = list(KINDS[name](model))
    cases = random.sample(cases, min(SLOW[name], len(cases)))
    taken = try_all(model, tmp_path, name, iter(cases))
    # Some say the same in other words, or nothing of the model: an index's metadata and names.
    assert taken < len(cases) * MOST[name]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda entry: entry.update(shape=[None, 64]), "shape must be a whole number"),
        (lambda entry: entry.update(shape=[float("nan"), 64]), "NaN is not a JSON number"),
        (lambda entry: entry.update(shape=[64, 1]), "other bytes than its dtype and shape take"),
        (lambda entry: entry.update(data_offsets=[0, 1 << 40]), "lies outside the file"),
        (lambda entry: entry.update(data_offsets=[0.5, 8]), "data_offsets must be a whole number"),
        (lambda entry: entry.update(dtype=3), "dtype must be a line of text"),
    ],
)
def test_a_header_is_read_strictly(
    change: Callable[[dict[str, object]], None], why: str, models: Models, tmp_path: Path
) -> None:
    from broken_checkpoints import header_of, spelled, with_header

    header, data = header_of(models("llama") / "model.safetensors")
    change(next(entry for name, entry in header.items() if ".1." in name))
    content = with_header(spelled(header), data)
    broken = copy_with(models("llama"), tmp_path / "broken", "model.safetensors", content)
    done = answered("import", broken, "[1]", "-o", tmp_path / "m.json")
    assert done.code == 2
    assert "is not a whole safetensors file" in done.error
    assert why in done.error
