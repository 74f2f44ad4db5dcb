"""The manifest's JSON Schema against the reader."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT
from sleb_serve.errors import SlebError
from sleb_serve.manifest.pruning import REPAIRS
from sleb_serve.manifest.reader import parse_manifest
from sleb_serve.manifest.schema import OBJECTIVES
from test_manifest import SHA, example

SCHEMA = json.loads(
    (ROOT / "docs" / "reference" / "manifest.schema.json").read_text(encoding="utf-8")
)
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def schema_refuses(value: Any) -> bool:
    return not VALIDATOR.is_valid(value)


def reader_says(value: Any) -> str | None:
    """Why the reader refuses a manifest; None if it does not."""
    try:
        parse_manifest(json.dumps(value).encode())
    except SlebError as error:
        return str(error)
    return None


BEYOND_A_SCHEMA = re.compile(
    r"names (block \d+ twice|all \d+ blocks)"
    r"|block must be between 0 and|samples\[\d+\]\[\d+\] must be between 0 and"
    r"|but exp\(loss\) is"
    r"|digests for \d+ blocks"
    r"|one log-probability for each token"
    r"|repairs: two are for the same|repairs\[\d+\]\.blocks must be between 1 and"
    r"|_barrier must be between 0 and"
    r"|must be a whole number, found -?\d"
    r"|lone surrogate|nested too deeply|out of range"
)
"""What the manual names as refused by the reader alone: relations between values, and spelling."""

RECORDS = [
    path
    for path in sorted((ROOT / "benchmarks" / "records").rglob("*.json"))
    if "schema_version" in json.loads(path.read_text(encoding="utf-8"))
]


TRAINING = {
    "texts": {"wikitext2": 1.0, "chats.jsonl": 2.0},
    "tokens": 2_000_000,
    "rank": 32,
    "seed": 0,
    "perplexity": {"dense": 20.5, "pruned": 41.0, "healed": 25.0},
    "agreement": {"pruned": 0.5, "healed": 0.8},
}


def full() -> dict[str, Any]:
    """A manifest with every key that there is."""
    value = example()
    value["model"] |= {"num_blocks": 6, "block_sha256": [SHA] * 6, "full_sha256": [SHA] * 7}
    for removal, block in zip(value["removed"], (4, 3, 1), strict=True):
        removal["block"] = block
    value["calibration"]["rows"] = 128
    value["selection"] |= {"objective": "nll", "samples": [[3, 4], [3, 1]]}
    fold = {
        "kind": "fold",
        "file": "m.json.repair.safetensors",
        "sha256": SHA,
        "blocks": 3,
        "sequences": 8,
        "loss": 3.1,
    }
    healed = {"kind": "heal", "blocks": 2, "training": copy.deepcopy(TRAINING)}
    value["repairs"] = [fold, {name: fold[name] for name in fold if name != "loss"} | healed]
    value["golden"] = {"tokens": [1, 2, 3], "logprobs": [-1.0, -2.5]}
    digests = {"config_sha256": SHA, "weights_sha256": SHA}
    value["rebound_from"] = {"id": "org/first", "revision": None, **digests}
    return value


def test_the_schema_is_one_and_knows_what_the_reader_knows() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert tuple(SCHEMA["properties"]["repairs"]["items"]["properties"]["kind"]["enum"]) == REPAIRS
    objective = SCHEMA["properties"]["selection"]["properties"]["objective"]
    assert tuple(objective["enum"]) == OBJECTIVES


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parent.name)
def test_recorded_manifests_validate(path: Path) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    assert reader_says(value) is None
    assert not schema_refuses(value)


def test_manifests_of_the_tests_validate() -> None:
    assert len(RECORDS) >= 2
    for value in (example(), full()):
        assert reader_says(value) is None
        assert not schema_refuses(value)
        assert not schema_refuses(json.loads(parse_manifest(json.dumps(value).encode()).to_json()))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schema_version", 2),
        ("schema_version", True),
        ("model", None),
        ("model.num_blocks", 0),
        ("model.num_blocks", 10**12),
        ("model.revision", 7),
        ("model.architecture", ""),
        ("model.id", "a\nb"),
        ("model.config_sha256", SHA.upper()),
        ("model.weights_sha256", SHA + "\n"),
        ("model.block_sha256", [1] * 6),
        ("model.full_sha256", [1] * 7),
        ("model.surprise", 1),
        ("surprise", 1),
        ("removed", []),
        ("removed", {}),
        ("removed.0", 14),
        ("removed.1.block", -1),
        ("removed.1.block", True),
        ("removed.1.loss", "3"),
        ("removed.1.loss", None),
        ("removed.1.colour", 1),
        ("dense.loss", False),
        ("calibration.sequences", 0),
        ("calibration.sequence_length", 1),
        ("calibration.tokens_sha256", None),
        ("selection.objective", "best"),
        ("selection.samples", [[]]),
        ("selection.samples", [[3, 3]]),
        ("repairs", {}),
        ("repairs.0", None),
        ("repairs.0.kind", "map"),
        ("repairs.0.file", "../elsewhere"),
        ("repairs.0.file", ".."),
        ("repairs.0.loss", None),
        ("repairs.1.blocks", 0),
        ("repairs.1.training", []),
        ("repairs.1.training.texts", {"a": "1"}),
        ("repairs.1.training.rank", 0),
        ("golden", None),
        ("golden.tokens", [1]),
        ("golden.logprobs", []),
        ("evaluation", []),
        ("created_by.torch", 2),
    ],
)
def test_what_the_reader_refuses_for_its_structure_the_schema_refuses(
    path: str, value: Any
) -> None:
    changed = full()
    put(changed, path.split("."), value)
    assert reader_says(changed) is not None
    assert schema_refuses(changed)


@pytest.mark.parametrize("key", ["schema_version", "model", "removed"])
def test_a_manifest_without_a_required_key_is_refused(key: str) -> None:
    value = full()
    del value[key]
    assert schema_refuses(value)


def put(value: Any, path: list[str], new: Any) -> None:
    for part in path[:-1]:
        value = value[int(part)] if part.isdigit() else value[part]
    value[int(path[-1]) if path[-1].isdigit() else path[-1]] = new


def places(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every place inside a JSON value."""
    items: Any = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = list(enumerate(value))[:3]
    for key, inner in items:
        yield (*path, str(key))
        yield from places(inner, (*path, str(key)))


PLACES = [path for path in places(full()) if path[0] != "evaluation"]
ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 5, 6, 1 << 31, (1 << 31) + 1, 1 << 62, (1 << 62) + 1),
    *(100_000, 100_001, 30.0, 0.5, 1e16, "", "x", "a/b", ".", "..", "fold", "kl", "3"),
    *("\n", "a\u2028b", "\u0007", SHA, SHA[:-1], SHA.upper(), SHA + "\n"),
    *([], [1], [1, 1], [-1], [True], ["x"], [SHA], [[3]], [[3, 3]], [[]]),
    *({}, {"block": 2}, {"block": 2, "loss": 1.5}, {"loss": 0, "perplexity": 1}, {"x": 1}),
    *({"perplexity": 2}, {"block": 2, "perplexity": None}),
)
"""Values of every type, on both sides of every limit."""


def agree(value: Any) -> bool:
    """Whether both take a manifest, or refuse it; the reader may refuse more, by what it says."""
    said = reader_says(value)
    if schema_refuses(value):
        return said is not None
    return said is None or BEYOND_A_SCHEMA.search(said) is not None


def test_schema_and_reader_agree_on_every_place_and_value() -> None:
    differ = []
    for path in PLACES:
        for new in ODD:
            value = full()
            put(value, list(path), new)
            if not agree(value):
                differ.append((path, new, reader_says(value)))
    assert not differ


def test_the_reader_alone_knows_what_a_terminal_prints() -> None:
    value = full()
    value["model"]["id"] = "no\u00a0break"
    assert "must be a line of text" in str(reader_says(value))
    assert not schema_refuses(value)


def test_schema_and_reader_agree_on_missing_and_unknown_keys() -> None:
    for path in [(), *PLACES]:
        value = full()
        place: Any = value
        for part in path:
            place = place[int(part)] if part.isdigit() else place[part]
        if not isinstance(place, dict):
            continue
        for key in [*place, "surprise"]:
            kept = place.pop(key, None)
            if key == "surprise":
                place[key] = 1
            assert agree(value), (path, key)
            place.pop(key, None)
            if key != "surprise":
                place[key] = kept


@given(st.lists(st.tuples(st.sampled_from(PLACES), st.sampled_from(ODD)), min_size=2, max_size=4))
def test_schema_and_reader_agree_on_several_changes(
    changes: list[tuple[tuple[str, ...], Any]],
) -> None:
    value = full()
    for path, new in changes:
        try:
            put(value, list(path), copy.deepcopy(new))
        except (TypeError, KeyError, IndexError, ValueError):
            return  # an earlier change took the place away
    assert agree(value), reader_says(value)
