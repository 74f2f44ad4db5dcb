"""Lists of removed blocks from other tools, and for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sleb_serve.cli import main
from sleb_serve.errors import SlebError
from sleb_serve.interchange import llama_cpp_list, mergekit_config, read_blocks
from sleb_serve.manifest import Manifest, ModelBinding, Removal, read_manifest
from test_cli import refused

Models = Callable[[str], Path]

OFFICIAL = """\
Time Elapsed: 612.7
Model Name: facebook/opt-125m
# Total Blocks: 8
# Remove Blocks: 2
Dataset: wikitext2
Seed: 0
Barriers: early 1 / latter 1
Block Removal Order: [5, 2]
WikiText-2 PPL = 33.21
C4 PPL = 30.00

Time Elapsed: 700.1
Model Name: meta-llama/Llama-2-7b-hf
# Total Blocks: 32
# Remove Blocks: 3
Dataset: wikitext2
Seed: 0
Barriers: early 1 / latter 1
Block Removal Order: [14, 23, 11]

Model Name: facebook/opt-125m
Block Removal Order: [6, 1, 3]
WikiText-2 PPL: 40.11 C4 PPL: 38.20

"""


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("[5, 4, 2]", (5, 4, 2)),
        ("5,4,2", (5, 4, 2)),
        ("5 4 2\n", (5, 4, 2)),
        ('{"layers_to_remove": [3, 6]}', (3, 6)),
        ("- 3\n- 6\n", (3, 6)),
        ('{"drop_attn_list": [2, 5], "drop_mlp_list": [5, 2]}', (2, 5)),
        (
            json.dumps(
                {
                    key: [i in (2, 5) for i in range(8)]
                    for key in ("drop_attn_list", "drop_mlp_list")
                }
            ),
            (2, 5),
        ),
        (OFFICIAL, (6, 1, 3)),
        (
            "slices:\n- sources:\n  - {model: a, layer_range: [0, 2]}\n"
            "- sources:\n  - {model: a, layer_range: [3, 8]}\nmerge_method: passthrough\n",
            (2,),
        ),
    ],
)
def test_forms_that_are_known(tmp_path: Path, text: str, blocks: tuple[int, ...]) -> None:
    file = tmp_path / "source"
    file.write_text(text)
    assert read_blocks(str(file), 8).blocks == blocks


def test_a_run_of_slebs_results_can_be_chosen(tmp_path: Path) -> None:
    file = tmp_path / "sleb.txt"
    file.write_text(OFFICIAL)
    assert read_blocks(str(file), 8, 1).blocks == (5, 2)
    assert read_blocks(str(file), 32, 2).blocks == (14, 23, 11)
    with pytest.raises(SlebError, match="is of a model with 32 blocks, this one has 8"):
        read_blocks(str(file), 8, 2)
    with pytest.raises(SlebError, match="holds 3 runs"):
        read_blocks(str(file), 8, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no blocks here", "in a form known here"),
        ('{"drop_attn_list": [2, 5], "drop_mlp_list": [5]}', "only the MLP of block 2"),
        ('{"removed": [true, false]}', "not a list of block numbers"),
        ("Block Removal Order: [1, x]", "not a list of block numbers"),
        ("slices:\n- sources:\n  - {model: a, layer_range: [0, 9]}\n", "does not lie within"),
        ("slices: 3", "must have one source"),
        (
            "slices:\n- sources:\n  - {model: a, layer_range: [0, 4]}\n"
            "- sources:\n  - {model: a, layer_range: [2, 8]}\n",
            "repeats or moves blocks",
        ),
        (
            "slices:\n- sources:\n  - {model: a, layer_range: [0, 4]}\n"
            "- sources:\n  - {model: b, layer_range: [5, 8]}\n",
            "several models",
        ),
        ("merge_method: slerp\nslices: []\n", "only merge_method: passthrough"),
    ],
)
def test_what_is_not_a_removal_of_blocks_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "source"
    file.write_text(text)
    with pytest.raises(SlebError, match=message):
        read_blocks(str(file), 8)


@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda b: b.decode("latin-1")))
def test_any_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.mktemp("any") / "source"
    file.write_text(text)
    said = ""
    try:
        read_blocks(str(file), 8)
    except SlebError as error:
        said = str(error)
    assert "\n" not in said


@given(st.sets(st.integers(0, 7), min_size=1, max_size=7))
def test_what_mergekit_is_given_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, removed: set[int]
) -> None:
    model = ModelBinding("m", None, "LlamaForCausalLM", 8, "0" * 64, "0" * 64)
    manifest = Manifest(model, tuple(map(Removal, removed)))
    text = mergekit_config("some/model: 'x'", manifest, "bfloat16")
    kept = [
        block
        for entry in yaml.safe_load(text)["slices"]
        for source in entry["sources"]
        for block in range(*source["layer_range"])
    ]
    assert kept == [block for block in range(8) if block not in removed]
    file = tmp_path_factory.mktemp("mergekit") / "merge.yaml"
    file.write_text(text)
    assert set(read_blocks(str(file), 8).blocks) == removed
    assert llama_cpp_list(manifest) == ",".join(map(str, sorted(removed)))


def test_import_writes_a_manifest_that_is_bound_to_the_model(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "sleb.txt", tmp_path / "m.json"
    source.write_text(OFFICIAL)
    path = str(models("llama"))
    assert main(["import", str(source), path, "-o", str(output), "--run", "1"]) == 0
    assert "2 of 8 blocks" in capsys.readouterr().out
    manifest = read_manifest(output)
    assert manifest.blocks == (5, 2)
    assert manifest.created_by["imported_from"] == "SLEB's run 1 of 3 of sleb.txt"
    assert main(["serve", path, "-m", str(output), "--dry-run"]) == 0
    with_manifest = capsys.readouterr().out
    assert main(["serve", path, "--removal-list", "[5, 2]", "--dry-run"]) == 0
    assert capsys.readouterr().out == with_manifest
    for text, message in (
        ("[5, 8]", "names block 8; "),
        ("[5, 5]", "names block 5 twice"),
        ("[]", "cannot read '[]'"),
    ):
        arguments = ["import", text, path, "-o", str(tmp_path / "n.json")]
        assert message in refused(arguments, capsys)
    assert not (tmp_path / "n.json").exists()
