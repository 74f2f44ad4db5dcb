"""Digests of models, and refusals of folders without one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from conftest import Models
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.checkpoint.safetensors import tensors_of
from sleb_serve.cut.config import Cut
from sleb_serve.cut.written import with_quantisation
from sleb_serve.errors import SlebError


@pytest.fixture
def llama(models: Models, tmp_path: Path) -> Path:
    return shutil.copytree(models("llama"), tmp_path / "llama")


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_model_is_described_from_its_files(llama: Path) -> None:
    checkpoint = open_checkpoint(str(llama))
    assert checkpoint.architecture == "LlamaForCausalLM"
    assert checkpoint.num_blocks == 8


@pytest.mark.parametrize("place", [(), ("text_config",)])
def test_a_quantisation_is_renumbered_where_it_stands(
    models: Models, tmp_path: Path, place: tuple[str, ...]
) -> None:
    """At the top of config.json, or in the decoder's own part of it, as multimodal models have."""
    shutil.copytree(models("llama"), tmp_path / "llama")
    config = json.loads((tmp_path / "llama/config.json").read_text())
    own = {
        "quant_method": "compressed-tensors",
        "ignore": ["lm_head", "model.layers.6.mlp.up_proj"],
    }
    if place:
        config = {"architectures": config["architectures"], "text_config": config}
        config["text_config"]["quantization_config"] = own
    else:
        config["quantization_config"] = own
    (tmp_path / "llama/config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(str(tmp_path / "llama"))
    found = with_quantisation(checkpoint, checkpoint.config, Cut(8, (2, 5)))
    inner = found["text_config"] if place else found
    assert inner["quantization_config"]["ignore"] == ["lm_head", "model.layers.4.mlp.up_proj"]
    assert place == () or "quantization_config" not in found
    (tmp_path / "llama/hf_quant_config.json").write_text("[]")
    with pytest.raises(SlebError, match=r"hf_quant_config.json: it must be an object"):
        with_quantisation(checkpoint, checkpoint.config, Cut(8, (2, 5)))


def test_sharding_does_not_change_the_weights_digest(llama: Path, tmp_path: Path) -> None:
    import oracle

    oracle.load(llama).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    sharded = open_checkpoint(str(tmp_path / "sharded"))
    assert len(sharded.weight_files()) > 2
    assert sharded.weights_sha256() == open_checkpoint(str(llama)).weights_sha256()
    assert sharded.config_sha256() == open_checkpoint(str(llama)).config_sha256()
    sharded.weight_files()[1].unlink()
    with pytest.raises(SlebError, match="lacks the checkpoint shard model-00002"):
        sharded.weights_sha256()


def test_changed_weights_and_config_change_their_digests(llama: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    before = open_checkpoint(str(llama))
    old = before.weights_sha256(), before.config_sha256()
    edit_config(llama, rope_theta=1.0, transformers_version="0")
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"] += torch.finfo(torch.float32).eps
    save_file(tensors, llama / "model.safetensors")
    after = open_checkpoint(str(llama))
    assert after.weights_sha256() != old[0]
    assert after.config_sha256() != old[1]


def test_how_a_config_was_written_does_not_change_its_digest(llama: Path) -> None:
    old = open_checkpoint(str(llama)).config_sha256()
    edit_config(
        llama, transformers_version="0", use_cache=False, _name_or_path="x", dtype="float16"
    )
    assert open_checkpoint(str(llama)).config_sha256() == old


def test_a_truncated_checkpoint_is_refused(llama: Path) -> None:
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(SlebError, match="is not a whole safetensors file"):
        open_checkpoint(str(llama)).weights_sha256()
    file.write_bytes(b"abc")
    with pytest.raises(SlebError, match="is not a whole safetensors file"):
        open_checkpoint(str(llama)).weights_sha256()


def test_pytorch_checkpoints_have_a_digest(llama: Path) -> None:
    import torch
    from safetensors.torch import load_file

    tensors = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    torch.save(tensors, llama / "pytorch_model.bin")
    first = open_checkpoint(str(llama)).weights_sha256()
    tensors["model.norm.weight"] += 1
    torch.save(tensors, llama / "pytorch_model.bin")
    assert open_checkpoint(str(llama)).weights_sha256() != first
    (llama / "pytorch_model.bin").unlink()
    with pytest.raises(SlebError, match="holds no weights"):
        open_checkpoint(str(llama)).weights_sha256()


def test_parameters_are_counted_by_block(llama: Path) -> None:
    import oracle

    counts = open_checkpoint(str(llama)).parameter_counts()
    model = oracle.load(llama)
    blocks = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    assert counts == (sum(p.numel() for p in model.parameters()) - sum(blocks), blocks)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "no such model"),
        ("org/model-that-is-nowhere", "no such model"),
        ("not a repo id!", "no such model"),
    ],
)
def test_what_is_no_model_is_refused(name: str, message: str) -> None:
    with pytest.raises(SlebError, match=message):
        open_checkpoint(name)


@pytest.mark.parametrize("config", ["{", "[]", "", "\x00"])
def test_a_broken_config_is_refused(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(SlebError, match=r"config\.json"):
        open_checkpoint(str(tmp_path))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SlebError, match=r"without config\.json"):
        open_checkpoint(str(tmp_path))


def test_the_weights_digest_is_a_digest_of_blocks(llama: Path) -> None:
    """Written out again, from the safetensors library's view of the file."""
    import hashlib

    from safetensors import safe_open

    def digest(value: object) -> str:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    leaves: list[bytes] = [b""] * 9
    with safe_open(llama / "model.safetensors", "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            data = tensor.numpy().tobytes()
            if len(data) > 4 * 4096:
                starts = [i * (len(data) - 4096) // 3 for i in range(4)]
                data = b"".join(data[start : start + 4096] for start in starts)
            parts = name.split(".")
            place = 1 + int(parts[2]) if parts[1] == "layers" else 0
            head = json.dumps([name, "F32", list(tensor.shape)], separators=(",", ":"))
            leaves[place] += head.encode() + data
    expected = digest([hashlib.sha256(leaf).hexdigest() for leaf in leaves])
    assert open_checkpoint(str(llama)).weights_sha256() == expected


def test_a_known_block_is_not_read(llama: Path, tmp_path: Path) -> None:
    import oracle

    oracle.load(llama).save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    sharded = open_checkpoint(str(tmp_path / "sharded"))
    whole, leaves = sharded.weights_sha256(), sharded.block_sha256()
    assert leaves is not None
    known = {block: leaves[1 + block] for block in (2, 3, 4)}
    assert sharded.weights_sha256(known) == whole
    assert sharded.weights_sha256({2: "0" * 64}) != whole
    unneeded = sharded.unneeded_files(frozenset(known))
    assert unneeded
    for name in unneeded:
        (sharded.path / name).unlink()
    assert sharded.weights_sha256(known) == whole
    with pytest.raises(SlebError, match="lacks the checkpoint shard"):
        sharded.weights_sha256()


def test_a_hub_model_is_found_in_the_cache(llama: Path, tmp_path: Path) -> None:
    """A cache laid out as the hub library does, in a place of its own, with no network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = tmp_path / "cache" / "models--org--tiny"
    shutil.copytree(llama, root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    found = open_checkpoint("org/tiny", cache_dir=str(tmp_path / "cache"))
    assert found.path.name == commit
    assert found.weights_sha256() == open_checkpoint(str(llama)).weights_sha256()
    with pytest.raises(SlebError, match="no such model"):
        open_checkpoint("org/tiny")


def test_weights_in_pytorchs_own_format_have_no_header(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(b"PK")
    with pytest.raises(SlebError, match="save them as safetensors first"):
        tensors_of(file)
