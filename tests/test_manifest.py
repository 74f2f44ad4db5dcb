"""The manifest's format: what is accepted, what is refused, how it is written and cut."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from sleb_serve.errors import SlebError
from sleb_serve.evaluation.report import describe
from sleb_serve.manifest.pruning import Pruning
from sleb_serve.manifest.reader import parse_manifest, read_manifest

SHA = "0123456789abcdef" * 4


def example() -> dict[str, Any]:
    """The design's example, with numbers for its ellipses."""
    return {
        "schema_version": 1,
        "model": {
            "id": "org/model",
            "revision": "main",
            "architecture": "LlamaForCausalLM",
            "num_blocks": 30,
            "config_sha256": SHA,
            "weights_sha256": SHA[::-1],
        },
        "removed": [
            {"block": 14, "loss": 3.106, "perplexity": 22.3},
            {"block": 3, "loss": 3.2, "perplexity": math.exp(3.2)},
            {"block": 20, "loss": 3.4, "perplexity": math.exp(3.4)},
        ],
        "dense": {"loss": 2.97, "perplexity": 19.5},
        "calibration": {
            "source": "wikitext2",
            "split": "train",
            "sequences": 8,
            "sequence_length": 512,
            "seed": 0,
            "tokens_sha256": SHA,
        },
        "selection": {
            "method": "sleb",
            "early_barrier": 1,
            "late_barrier": 1,
            "dtype": "bfloat16",
        },
        "evaluation": {"wikitext2": {"perplexity": [22.3, 24.5]}},
        "created_by": {"sleb_serve": "0.1.0", "torch": "2", "transformers": "5"},
    }


def parse(value: Any) -> Any:
    return parse_manifest(json.dumps(value).encode())


def test_the_designs_example_is_read() -> None:
    manifest = parse(example())
    assert manifest.blocks == (14, 3, 20)
    assert manifest.model.num_blocks == 30
    assert manifest.removed[0].loss == 3.106
    assert manifest.dense_loss == 2.97
    assert manifest.calibration.sequence_length == 512
    assert manifest.pruning().removed == (3, 14, 20)


def test_writing_and_reading_gives_the_same_manifest(tmp_path: Path) -> None:
    manifest = parse(example())
    manifest.write(tmp_path / "m.json")
    again = read_manifest(tmp_path / "m.json")
    assert again == manifest
    assert again.to_json() == manifest.to_json() == (tmp_path / "m.json").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["m.json"]


def test_only_the_model_and_the_removals_are_needed() -> None:
    value = {key: example()[key] for key in ("schema_version", "model", "removed")}
    value["removed"] = [{"block": 5}]
    manifest = parse(value)
    assert manifest.removed[0].loss is None
    assert parse_manifest(manifest.to_json()) == manifest
    assert "5" in describe(manifest)


def test_the_digests_of_removed_blocks_travel_with_the_pruning() -> None:
    digests = [f"{i:064x}" for i in range(30)]
    manifest = parse(change("model.block_sha256", digests))
    assert parse_manifest(manifest.to_json()) == manifest
    found = manifest.pruning()
    assert found.known_sha256 == {3: digests[3], 14: digests[14], 20: digests[20]}
    assert Pruning.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert found.digest == parse(example()).pruning().digest
    assert parse(example()).pruning().known_sha256 == {}


def test_a_prefix_removes_the_first_blocks() -> None:
    manifest = parse(example())
    assert manifest.prefix(2).blocks == (14, 3)
    assert manifest.prefix(None) is manifest
    for blocks in (0, -1, 4):
        with pytest.raises(SlebError, match=r"blocks=.*between 1 and 3"):
            manifest.prefix(blocks)


def test_the_digest_names_what_is_served_and_nothing_else() -> None:
    manifest = parse(example())
    digest = manifest.pruning().digest
    reordered = example()
    reordered["removed"] = reordered["removed"][::-1]
    reordered["created_by"] = {}
    reordered["model"]["id"] = "elsewhere"
    assert parse(reordered).pruning().digest == digest
    assert manifest.prefix(2).pruning().digest != digest
    for key in ("config_sha256", "weights_sha256"):
        other = example()
        other["model"][key] = "0" * 64
        assert parse(other).pruning().digest != digest
    assert manifest.pruning().tag == f"sleb3-{digest[:8]}"


def test_a_pruning_survives_its_travel_and_nothing_else_does() -> None:
    pruning = parse(example()).pruning()
    assert Pruning.from_dict(json.loads(json.dumps(pruning.to_dict()))) == pruning
    changes: tuple[dict[str, Any], ...] = (
        {"removed": [14, 3]},
        {"removed": []},
        {"removed": [3, 30]},
        {"removed": [3, 3]},
        {"num_blocks": True},
        {"config_sha256": "x"},
        {"extra": 1},
        {"removed_sha256": [SHA]},
        {"removed_sha256": ["x"] * 3},
    )
    for change in changes:
        with pytest.raises(SlebError):
            Pruning.from_dict({**pruning.to_dict(), **change})
    with pytest.raises(SlebError):
        Pruning.from_dict(None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("architecture", "architecture expected LlamaForCausalLM, found X"),
        ("num_blocks", "blocks expected 30, found 31"),
        ("config_sha256", "config_sha256 expected 0123"),
        ("weights_sha256", "weights_sha256 expected fedc"),
    ],
)
def test_another_model_is_refused_by_what_differs(name: str, expected: str) -> None:
    pruning = parse(example()).pruning()
    found: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "num_blocks": 30,
        "config_sha256": SHA,
        "weights_sha256": SHA[::-1],
    }
    pruning.check_binding("here", **found)
    found[name] = 31 if name == "num_blocks" else "X"
    with pytest.raises(SlebError, match=expected) as refusal:
        pruning.check_binding("here", **found)
    assert "here" in str(refusal.value)


def change(path: str, value: Any) -> dict[str, Any]:
    result = copy.deepcopy(example())
    *parents, last = path.split(".")
    place: Any = result
    for part in parents:
        place = place[int(part)] if part.isdigit() else place[part]
    if value is DELETE:
        del place[last]
    else:
        place[int(last) if last.isdigit() else last] = value
    return result


DELETE = object()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema_version", 2, "schema_version is 2"),
        ("schema_version", True, "schema_version must be a whole number"),
        ("schema_version", "1", "schema_version must be a whole number"),
        ("model", DELETE, "lacks the key 'model'"),
        ("model.num_blocks", 0, "model.num_blocks must be between"),
        ("model.num_blocks", 30.0, "model.num_blocks must be a whole number"),
        ("model.num_blocks", 10**12, "model.num_blocks must be between"),
        ("model.revision", 7, "model.revision must be a line of text"),
        ("model.architecture", "", "model.architecture must be a line of text"),
        ("model.id", "a\nb", "model.id must be a line of text"),
        ("model.config_sha256", SHA.upper(), "model.config_sha256 must be 64"),
        ("model.weights_sha256", SHA + "\n", "model.weights_sha256 must be 64"),
        ("model.block_sha256", [SHA], "has 1 digests for 30 blocks"),
        ("model.block_sha256", [1] * 30, r"model.block_sha256\[0\] must be 64"),
        ("model.full_sha256", [SHA] * 30, "has 30 digests for 30 blocks and the rest"),
        ("model.full_sha256", [1] * 31, r"model.full_sha256\[0\] must be 64"),
        ("model.surprise", 1, "unknown key 'surprise' in model"),
        ("surprise", 1, "unknown key 'surprise' in manifest"),
        ("removed", [], "removed is empty"),
        ("removed", {}, "removed must be a list"),
        ("removed.0", 14, r"removed\[0\] must be an object"),
        ("removed.1.block", 14, "names block 14 twice"),
        ("removed.1.block", 30, r"removed\[1\].block must be between 0 and 29"),
        ("removed.1.block", -1, r"removed\[1\].block must be between 0 and 29"),
        ("removed.1.block", True, r"removed\[1\].block must be a whole number"),
        ("removed.1.loss", "3", r"removed\[1\].loss must be a number"),
        ("removed.1.perplexity", 2.0, "but exp"),
        ("removed.1.colour", 1, "unknown key 'colour'"),
        ("dense.loss", False, "dense.loss must be a number"),
        ("calibration.sequences", 0, "calibration.sequences must be between"),
        ("calibration.tokens_sha256", DELETE, "lacks the key 'tokens_sha256'"),
        ("selection.late_barrier", 31, "selection.late_barrier must be between"),
        ("evaluation", [], "evaluation must be an object"),
        ("created_by.torch", 2, "created_by.torch must be a line of text"),
    ],
)
def test_what_is_not_the_format_is_refused_by_name(path: str, value: Any, message: str) -> None:
    with pytest.raises(SlebError, match=message) as refusal:
        parse(change(path, value))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON"),
        (b"[1, 2]", "manifest must be an object"),
        (b'{"schema_version": 1, "schema_version": 1}', "'schema_version' stands twice"),
        (b'{"schema_version": NaN}', "NaN is not a JSON number"),
        (b'{"schema_version": -Infinity}', "Infinity is not a JSON number"),
        (b'{"schema_version": 1e999}', "out of range"),
        (b'{"schema_version": ' + b"9" * 5000 + b"}", "out of range"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 50 + b"1" + b"}" * 50, "nested too deeply"),
        (b'{"a": "\\ud800"}', "lone surrogate"),
        (b" " * (5 << 20), "larger than 1048576 bytes"),
    ],
)
def test_hostile_bytes_are_refused_in_one_line(data: bytes, message: str) -> None:
    with pytest.raises(SlebError, match=message) as refusal:
        parse_manifest(data)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400


def test_every_truncation_is_refused() -> None:
    data = parse(example()).to_json()
    for length in range(0, len(data) - 2, 7):
        with pytest.raises(SlebError):
            parse_manifest(data[:length])


def test_all_blocks_cannot_go() -> None:
    value = example()
    value["model"]["num_blocks"] = 2
    value["removed"] = [{"block": 0}, {"block": 1}]
    with pytest.raises(SlebError, match="at least one must remain"):
        parse(value)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "m.json"
    manifest = parse(example())
    manifest.write(path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SlebError, match="No space left on device"):
        manifest.prefix(1).write(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.json"]


def test_show_tells_blocks_losses_and_origin() -> None:
    text = describe(parse(example()))
    for part in ("org/model", "3 of 30 blocks (10.0 %)", "22.3", "dense", "wikitext2", "sleb3-"):
        assert part in text
    assert "███·██████████·█████·█████████" in text
