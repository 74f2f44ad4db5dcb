"""Hostile manifests: accepted or refused in one line, by every reader, and never a traceback."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import Models
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.cli.main import main
from sleb_serve.errors import SlebError
from sleb_serve.manifest.binding import bind
from sleb_serve.manifest.pruning import Pruning
from sleb_serve.manifest.schema import Golden, Manifest, Removal

ATTACKS = sorted((Path(__file__).parent / "attacks").iterdir())


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and error of the command line; an exception fails the test."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = main(list(arguments))
    return code, out.getvalue(), error.getvalue()


@pytest.mark.parametrize("path", ATTACKS, ids=lambda path: path.stem)
def test_a_named_attack_is_refused_in_one_line(path: Path, models: Models) -> None:
    for arguments in (
        ["show", str(path)],
        ["check", str(models("llama")), "-m", str(path)],
        ["serve", str(models("llama")), "-m", str(path), "--dry-run"],
    ):
        code, out, error = run(*arguments)
        assert (code, out) == (2, "")
        (line,) = error.splitlines()
        assert line.startswith(f"sleb-serve: error: {path}: ")
        assert line.isprintable()


@pytest.fixture(scope="module")
def model(models: Models) -> Path:
    return models("llama")


@pytest.fixture(scope="module")
def honest(model: Path) -> dict[str, Any]:
    """A manifest of the tiny model with every part, as its file's JSON."""
    manifest = Manifest(
        bind(str(model), open_checkpoint(str(model))),
        (Removal(3, 2.5), Removal(1, 2.75)),
        dense_loss=2.25,
        golden=Golden((1, 2), (-1.0,)),
        created_by={"sleb_serve": "0"},
    )
    value: dict[str, Any] = json.loads(manifest.to_json())
    return value


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value within, the whole left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*above, key)
        if isinstance(item, dict | list):
            yield from places(item, (*above, key))


hostile = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(10**30), max_value=10**30)
    | st.integers(0, 9)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        ["../../etc/passwd", "/dev/zero", "\x1b[2J", "a\u2028b", "0" * 64, "f" * 63 + "g", "\x00"]
    ),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8) | st.just("block"), inner, max_size=4)
    ),
    max_leaves=8,
)


ANY_MANIFEST = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=150, suppress_health_check=ANY_MANIFEST)
@given(data=st.data())
def test_changed_manifests_are_accepted_or_refused_in_one_line(
    data: st.DataObject, honest: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    check_answers(changed(data, honest), honest, model, tmp_path / "m.json")


@pytest.mark.slow
@settings(max_examples=1000, suppress_health_check=ANY_MANIFEST)
@given(data=st.data())
def test_a_thousand_changed_manifests_are_accepted_or_refused_in_one_line(
    data: st.DataObject, honest: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    check_answers(changed(data, honest), honest, model, tmp_path / "m.json")


def changed(data: st.DataObject, honest: dict[str, Any]) -> dict[str, Any]:
    """An honest manifest with up to three changes."""
    value = copy.deepcopy(honest)
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.sampled_from(list(places(value))))
        place: Any = value
        for key in where[:-1]:
            place = place[key]
        how = data.draw(st.sampled_from(["change", "change", "drop", "add", "double"]))
        if how == "drop":
            del place[where[-1]]
        elif how == "double" and isinstance(place, list):
            place.append(copy.deepcopy(place[where[-1]]))
        elif how == "add" and isinstance(place, dict):
            place[data.draw(st.text(max_size=8))] = data.draw(hostile)
        else:
            place[where[-1]] = data.draw(hostile)
        if not value:
            break
    return value


def check_answers(value: dict[str, Any], honest: dict[str, Any], model: Path, path: Path) -> None:
    """Every reader takes a manifest, or refuses it in one line."""
    path.write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")

    code, out, error = run("show", str(path))
    assert code in (0, 2)
    assert len(error.splitlines()) == (code == 2)
    checked, told, error = run("check", str(model), "-m", str(path))
    assert (checked == 2) == (code == 2)
    assert len(error.splitlines()) == (checked == 2)
    assert all(line.isprintable() for line in told.splitlines())
    if code == 0:
        assert out.strip()

    # What reaches a worker is parsed again there, whoever wrote it.
    for content in (
        value.get("model"),
        {**honest["model"], "removed": value.get("removed")},
        value,
    ):
        with contextlib.suppress(SlebError):
            Pruning.from_dict(content)
    with contextlib.suppress(SlebError):
        Pruning.from_dict({**pruning_of(honest), **hostile_part(value)})


def pruning_of(honest: dict[str, Any]) -> dict[str, Any]:
    """An honest pruning's content."""
    keys = ("architecture", "num_blocks", "config_sha256", "weights_sha256")
    return {**{key: honest["model"][key] for key in keys}, "removed": [1, 3]}


def hostile_part(value: dict[str, Any]) -> dict[str, Any]:
    """What of a changed manifest fits into a pruning, whatever it is."""
    model = value.get("model")
    found = dict(model) if isinstance(model, dict) else {"num_blocks": model}
    removed = value.get("removed")
    if isinstance(removed, list):
        found["removed"] = [r.get("block") if isinstance(r, dict) else r for r in removed]
    keys = pruning_of(
        {"model": dict.fromkeys(("architecture", "num_blocks", "config_sha256", "weights_sha256"))}
    ).keys()
    return {key: found[key] for key in keys if key in found}
