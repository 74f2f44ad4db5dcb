"""Lists of removed blocks from other tools, and for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from commands import refused
from conftest import Models
from sleb_serve.cli.main import main
from sleb_serve.convert.found import Found
from sleb_serve.convert.lists import llama_cpp_list, read_blocks
from sleb_serve.convert.mergekit import mergekit_config
from sleb_serve.errors import SlebError
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.manifest.schema import Manifest, ModelBinding, Removal

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
        ("[27 26\n 25]", (27, 26, 25)),
        ("[np.int64(5), np.int64(4)]", (5, 4)),
        ("\ufeff[5, 4]", (5, 4)),
        ('{"layers_to_remove": [3, 6]}', (3, 6)),
        ('{\n\t"layers_to_skip": [6, 3]\n}', (6, 3)),
        ("Removed layers: [6, 3]", (6, 3)),
        # One list is a sorted copy, and the others agree with it.
        (
            '{"removed_layers": [3, 6], "removal_order": [6, 3], "pruned_layers": 2,'
            ' "layers_kept": [0, 1, 2, 4, 5, 7], "num_hidden_layers": 6, "original_layers": 8}',
            (6, 3),
        ),
        ('{"removed_layers": [6, 3], "num_hidden_layers": 8}', (6, 3)),
        ("- 3\n- 6\n", (3, 6)),
        ('{"drop_attn_list": [5, 2], "drop_mlp_list": [2, 5]}', (5, 2)),
        (
            json.dumps(
                {
                    "num_hidden_layers": 8,
                    "drop_attn_list": [i in (2, 5) for i in range(8)],
                    "drop_mlp_list": [5, 2],
                }
            ),
            (5, 2),
        ),
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
        (
            "---\nslices:\n- sources:\n  - {model: {model: {path: a}}, layer_range: [0, 6]}\n"
            "  base_model: null\nmerge_method: passthrough\nbase_model: a\ntokenizer_source: b\n"
            "parameters: {int8_mask: true}\nout_dtype: bfloat16\nchat_template: auto\n---\n",
            (6, 7),
        ),
        ("Current Block Removal List: [5]\r\nCurrent Block Removal List: [5, 2]\r\n", (5, 2)),
        ("INFO:root:Current Block Removal List: [5]\nBlock Removal Order: [6, 1]\n", (6, 1)),
        ("current skip list: [5]\n", (5,)),
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


KILLED = """\
Loaded Model: example-org/base-7b
Phase 1 of 3
[Block 5 (Original block 5) removed] Loss=790111.500, Current Min Loss=790111.500 / Layer 5
[SELECTED block 5 (Originally block 5)] Loss=790111.500
Current Block Removal List: [5]
Phase 2 of 3
[SELECTED block 2 (Originally block 2)] Loss=801000.250
Current Block Removal List: [5, 2]
Phase 3 of 3
[Block 1 (Original block 1) removed] Loss=840000.000, Current Min Loss=840000.000 / Layer 1
"""
DROPPED = {"model_type": "llama", "num_hidden_layers": 8, "drop_attn_list": [5, 4, 6, 3]}
ADAPTER = """\
slices:
- sources:
  - model: example-org/base-8b+example-org/adapter
    layer_range: [0, 4]
merge_method: passthrough
"""
SCALED = """\
slices:
  - sources:
      - model: example-org/base-8b
        layer_range: [0, 4]
  - sources:
      - model: example-org/base-8b
        layer_range: [4, 6]
        parameters:
          scale:
            - filter: o_proj
              value: 0.0
            - value: 1.0
merge_method: passthrough
"""


@pytest.mark.parametrize(
    ("text", "blocks", "form"),
    [
        (KILLED, (5, 2), "SLEB's unfinished run 1 of 1"),
        (
            json.dumps({**DROPPED, "drop_mlp_list": DROPPED["drop_attn_list"]}),
            (5, 4, 6, 3),
            "LLM-Drop's config",
        ),
        (
            json.dumps({**DROPPED, "drop_mlp_list": None}),
            None,
            "drops only the attention of block 3, 4, 5, 6; only whole blocks can be removed",
        ),
        (ADAPTER, None, r"slices\[0\] merges an adapter into the model"),
        (SCALED, None, r"slices\[1\] has parameters \('scale'\), which change weights"),
    ],
)
def test_files_that_people_have(
    tmp_path: Path, text: str, blocks: tuple[int, ...] | None, form: str
) -> None:
    file = tmp_path / "source"
    file.write_text(text)
    if blocks is None:
        with pytest.raises(SlebError, match=form):
            read_blocks(str(file), 8)
    else:
        assert read_blocks(str(file), 8) == Found(blocks, form)


def test_each_run_in_the_output_of_a_search_can_be_chosen(tmp_path: Path) -> None:
    file = tmp_path / "log.txt"
    file.write_text(
        "Current Block Removal List: [5]\nCurrent Block Removal List: [5, 2]\n"  # killed
        "Phase 1 of 2\nCurrent Block Removal List: [6]\nCurrent Block Removal List: [6, 4]\n"
        "Time_Elapsed: 3\n# Total Blocks: 8\nBlock Removal Order: [6, 4]\n"
        "Current Block Removal List: [6]\n"  # killed
    )
    found = [read_blocks(str(file), 8, run) for run in (1, 2, 3, None)]
    assert [(entry.blocks, entry.form) for entry in found] == [
        ((5, 2), "SLEB's unfinished run 1 of 3"),
        ((6, 4), "SLEB's run 2 of 3"),
        ((6,), "SLEB's unfinished run 3 of 3"),
        ((6,), "SLEB's unfinished run 3 of 3"),
    ]
    with pytest.raises(SlebError, match=r"run 2 of .* is of a model with 8 blocks"):
        read_blocks(str(file), 9, 2)


def test_a_list_may_be_longer_than_a_file_name() -> None:
    blocks = tuple(range(1, 99))
    assert read_blocks(str(list(blocks)), 100).blocks == blocks
    with pytest.raises(SlebError, match="run=2: the list holds no runs of SLEB"):
        read_blocks("[5, 4]", 8, 2)


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
    assert main(["import", path, str(source), "-o", str(output), "--run", "1"]) == 0
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
        ("[5, -1]", "it holds a negative number"),
        ("5 -1", "it holds a negative number"),
        ("[]", "is empty: nothing is removed"),
        ("none.yaml", "cannot read 'none.yaml'"),
    ):
        arguments = ["import", path, text, "-o", str(tmp_path / "n.json")]
        assert message in refused(arguments, capsys)
    assert not (tmp_path / "n.json").exists()
