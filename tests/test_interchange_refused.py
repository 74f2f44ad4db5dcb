"""Refused lists of other tools, with more than whole blocks."""

from __future__ import annotations

from pathlib import Path

import pytest

from sleb_serve.convert.lists import read_blocks
from sleb_serve.errors import SlebError

SLICES = "merge_method: passthrough\nslices:\n- sources:\n  - {model: a, layer_range: [0, 6]%s}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no blocks here", "in a known format"),
        ("[5, 4, 1", "in a known format"),
        ("5,,4", "in a known format"),
        ("[5, '4']", "not a list of block numbers: it holds the text '4'"),
        ("[5, 4.0]", "not a list of block numbers: it holds 4.0"),
        ("5 4.5", "not a list of block numbers: it holds 4.5"),
        ("[5, -1]", "it holds a negative number, and blocks count from 0"),
        ("[5, 1" + 30 * "0" + "]", "it holds a number beyond any model's blocks"),
        ("[5, [4]]", "it holds something else than numbers"),
        ("- 0x" + 9000 * "f", "it holds a number beyond any model's blocks"),
        ('["model.layers.4"]', "it holds the text 'model.layers.4'"),
        ('{"schema_version": 1, "removed": [{"block": 5}]}', "is a removal manifest already"),
        ('{"pruned_layers": 4}', "pruned_layers is not a list of block numbers"),
        ('{"layers_kept": [0, 1]}', "layers_kept lists kept blocks; give the removed blocks"),
        ('{"removed": [1], "removed": [2]}', "key 'removed' stands twice"),
        ("removed: [1]\nremoved: [2]\n", "key 'removed' stands twice"),
        ("Removed layers: [1]\nremoved_layers: [2]\n", "key 'removed_layers' stands twice"),
        ('{"removed": [1, 2], "pruned_layers": [1, 3]}', "removed and pruned_layers disagree"),
        ('{"removed": [2, 1, 3], "pruned_layers": [3, 1, 2]}', "disagree"),
        ('{"removed": [1], "layers_kept": [0, 2, 3]}', "are not the 8 blocks of this model"),
        ('{"removed": [1], "num_hidden_layers": 32}', "is of a model with 32 blocks"),
        ('{"removed": [1], "original_layers": 7}', "is of a model with 7 blocks"),
        ('{"removed": [1], "original_layers": "8"}', "original_layers is not a number of blocks"),
        ("block_start,block_end,average_distance\n1,5,0.2\n", "PruneMe's distances"),
        ("[1, 2]\n---\n[3]\n", "holds 2 YAML documents"),
        ("a: &a {removed: [1]}\n<<: *a\n", "a YAML alias"),
        ("<<: {removed: [1]}\n", "merge key"),
        ("&a [*a]", "a YAML alias"),
        ("&a {removed: *a}", "a YAML alias"),
        ("Current Block Removal List: [5, 2", "run 1, is not a list of block numbers"),
        ('{"drop_attn_list": [2, 5], "drop_mlp_list": [5]}', "only the attention of block 2;"),
        (
            '{"drop_attn_list": [5], "drop_mlp_list": [5, 2, 1]}',
            "only the MLP of block 1, 2; only whole blocks can be removed",
        ),
        (
            '{"drop_attn_list": [4], "drop_mlp_list": [1]}',
            "only the attention of block 4 and only the MLP of block 1",
        ),
        (
            '{"num_hidden_layers": 32, "drop_attn_list": [5], "drop_mlp_list": [5]}',
            r"is of a model with 32 blocks \(num_hidden_layers\), this one has 8",
        ),
        ('{"drop_attn_list": [true], "drop_mlp_list": [0]}', "is of a model with 1 blocks"),
        (SLICES % ", parameters: {scale: 0.5}", r"parameters \('scale'\), which change weights"),
        (SLICES % ", weight: 0.5", r"slices\[0\].sources\[0\] has 'weight'"),
        (SLICES % ", layer_range: [0, 5]", "key 'layer_range' stands twice"),
        (SLICES % "" + "  residual_weight: 0.5\n", r"slices\[0\] has 'residual_weight'"),
        (SLICES % "" + "  parameters: {scale: 1}\n", r"parameters \('scale'\)"),
        (SLICES % "" + "parameters: {scale: 1}\n", r"parameters \('scale'\)"),
        (SLICES % "" + "base_model: b\n", "several models"),
        (SLICES % "" + "  base_model: b\n", "several models"),
        (SLICES % "" + "modules: {}\n", "has 'modules'"),
        (SLICES % "" + "---\n" + SLICES % "", "holds 2 YAML documents"),
        (SLICES.replace("a,", "{model: a, lora: b},") % "", "merges an adapter"),
        (SLICES.replace("a,", "{model: {path: a, lora: b}},") % "", "model has 'lora'"),
        (SLICES.replace("a,", "{model: a, override_architecture: B},") % "", "override_archi"),
        (SLICES.replace("a,", "3,") % "", "names no model"),
        (SLICES.replace("6", "'6'") % "", "layer_range is not a list of block numbers"),
        ("merge_method: passthrough\nmodels: [{model: a}]\n", "has 'models'"),
        ("merge_method: passthrough\nslices: []\n", "has no list of slices"),
        ('{"removed": [true, false]}', "not a list of block numbers"),
        ("Block Removal Order: [1, x]", "not a list of block numbers"),
        ("slices:\n- sources:\n  - {model: a, layer_range: [0, 9]}\n", "does not lie within"),
        ("slices: 3", "has no list of slices"),
        ("slices: [3]", "must have one source"),
        (
            "slices:\n- sources: [{model: a, layer_range: [0, 4]}, {model: b}]\n",
            "must have one source",
        ),
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
    with pytest.raises(SlebError, match=message) as caught:
        read_blocks(str(file), 8)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400
