"""Every way to ask for a model, and every pair of them: an error, or the manifest's model."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from conftest import Models
from exports import exported
from forking import run_fork
from running import OPTIONS, printed_command, selected
from sleb_serve.cli.main import main
from sleb_serve.manifest.reader import read_manifest
from ways import SERVED, WAYS, Way
from ways_tried import reload_others, try_all

pytest.importorskip("vllm")

SERVE, PRINTED = "serve", "printed"
PAIRS = list(combinations([way for way in WAYS if way.paired], 2))
SAMPLE = PAIRS[:: len(PAIRS) // 60]


@dataclass(frozen=True)
class Case:
    """A right command's parts, and where the places in ways are."""

    model: Path
    manifest: Path
    folder: Path
    places: Mapping[str, str]

    def told(self, text: str, way: Way) -> str:
        """A text of a way, its places filled in."""
        places = dict(self.places)
        if way.file:
            file = self.folder / f"{WAYS.index(way)}.yaml"
            file.write_text(_filled(way.file, places))
            places["{file}"] = str(file)
        return _filled(text, places)

    def arguments(self, *ways: Way) -> list[str]:
        return [argument for way in ways for argument in shlex.split(self.told(way.arguments, way))]

    def environment(self, *ways: Way) -> dict[str, str]:
        return {
            name: self.told(value, way) for way in ways for name, value in way.environment.items()
        }


def _filled(text: str, places: Mapping[str, str]) -> str:
    for name, place in places.items():
        text = text.replace(name, place)
    return text


@pytest.fixture(scope="module")
def case(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("ways")
    model, other = models("llama"), models("opt")
    places = {"{other}": str(other), "{copy}": str(folder / "copy")}
    shutil.copytree(model, folder / "copy")
    for name in ("other", "copy"):
        file = folder / f"to_{name}.json"
        file.write_text(json.dumps({str(model): places[f"{{{name}}}"]}))
        places[f"{{to_{name}}}"] = str(file)
    return Case(model, selected(model, folder), folder, places)


def by_serve(case: Case, way: Way) -> tuple[list[str], str]:
    """The command that `sleb-serve serve` would become with a way; or none, and its line."""
    started: list[list[str]] = []

    def start(_: str, command: list[str]) -> None:
        started.append(command)
        raise OSError(0, "not in a test")

    error = io.StringIO()
    asked = ["serve", str(case.model), "-m", str(case.manifest), *OPTIONS, *case.arguments(way)]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(error):
        patch.setattr(os, "execvp", start)
        patch.setattr(os, "environ", {**os.environ, **case.environment(way)})
        with contextlib.redirect_stdout(io.StringIO()):
            code = main(asked)
    assert code == 2
    return (started[0] if started else []), error.getvalue()


def tried(case: Case, commands: Sequence[tuple[list[str], dict[str, str]]]) -> list[Any]:
    """How each command ends; those of one VLLM_PLUGINS share a process, which reads it once."""
    outcomes: dict[int, Any] = {}
    plugins = [environment.get("VLLM_PLUGINS", "sleb") for _, environment in commands]
    for value in dict.fromkeys(plugins):
        numbers = [number for number, other in enumerate(plugins) if other == value]
        jobs, output = case.folder / "jobs.json", case.folder / "outcomes.json"
        asked = [
            {"arguments": command[command.index("--model") :], "environment": environment}
            for command, environment in (commands[number] for number in numbers)
        ]
        jobs.write_text(json.dumps(asked))
        log = case.folder / f"log {value}"
        code = run_fork(try_all, log, str(jobs), str(output), VLLM_PLUGINS=value)
        assert code == 0, log.read_text(errors="replace")[-4000:]
        outcomes |= zip(numbers, json.loads(output.read_text()), strict=True)
    return [outcomes[number] for number in range(len(commands))]


@pytest.fixture(scope="module")
def outcomes(case: Case) -> dict[tuple[int, str], tuple[str, str]]:
    """How each way ends, by its number and where it is given."""
    right = printed_command(case.model, case.manifest, *OPTIONS)
    found: dict[tuple[int, str], Any] = {}
    asked = {}
    for number, way in enumerate(WAYS):
        command, line = by_serve(case, way)
        if command:
            asked[number, SERVE] = command, case.environment(way)
        else:
            found[number, SERVE] = ["refused", line]
        asked[number, PRINTED] = [*right, *case.arguments(way)], case.environment(way)
    found |= zip(asked, tried(case, list(asked.values())), strict=True)
    return found


@pytest.mark.parametrize("start", [SERVE, PRINTED])
@pytest.mark.parametrize("number", range(len(WAYS)), ids=[way.name for way in WAYS])
def test_a_way_ends_as_the_table_says(outcomes: Any, case: Case, number: int, start: str) -> None:
    expected = getattr(WAYS[number], start)
    kind, text = outcomes[number, start]
    if expected == SERVED:
        assert (kind, text) == ("served", read_manifest(case.manifest).pruning().digest)
    else:
        assert kind == "refused", text
        assert expected in text


def check_pairs(case: Case, pairs: Sequence[tuple[Way, Way]]) -> None:
    """Add both ways of each pair to a right command; in both orders, if they share an option."""
    right = printed_command(case.model, case.manifest, *OPTIONS)
    orders = [*pairs, *((two, one) for one, two in pairs if one.options & two.options)]
    found = tried(
        case,
        [([*right, *case.arguments(*pair)], case.environment(*pair)) for pair in orders],
    )
    digest = read_manifest(case.manifest).pruning().digest
    wrong = [
        (*(way.name for way in pair), kind, text)
        for pair, (kind, text) in zip(orders, found, strict=True)
        if kind != "refused" and (kind, text) != ("served", digest)
    ]
    assert not wrong
    assert {kind for kind, _ in found} == {"refused", "served"}


def test_a_sample_of_pairs_ends_in_an_error_or_in_the_manifests_model(case: Case) -> None:
    check_pairs(case, SAMPLE)


@pytest.mark.slow
def test_every_pair_of_ways_ends_in_an_error_or_in_the_manifests_model(case: Case) -> None:
    check_pairs(case, PAIRS)


def test_a_model_that_runs_reloads_its_own_weights_only(case: Case) -> None:
    command, others = (
        printed_command(case.model, case.manifest, *OPTIONS, *blocks)
        for blocks in ([], ["--blocks", "2"])
    )
    shorter = exported(case.model, [2, 5], case.folder / "shorter")
    folders = [str(case.model), case.places["{copy}"], case.places["{other}"], str(shorter)]
    job, output, log = (case.folder / name for name in ("job.json", "reloaded.json", "log"))
    start = command.index("--model")
    asked = {"arguments": command[start:], "others": others[start:], "folders": folders}
    job.write_text(json.dumps(asked))
    assert run_fork(reload_others, log, str(job), str(output)) == 0, log.read_text()[-4000:]
    own, copy, other, fewer, depth = json.loads(output.read_text())
    assert own == copy
    assert own.endswith(" tensors")
    assert "architecture expected LlamaForCausalLM, found OPTForCausalLM" in other
    assert "number of decoder blocks expected 8, found 6" in fewer
    assert "the model that runs is of manifest sleb3-" in depth
