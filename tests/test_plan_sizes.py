"""The sizes in `sleb-serve plan`, against Transformers and stored files."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
import hub
import tiny_multimodal
from commands import run_in_one
from conftest import THOROUGH, Models
from matrix import MODELS, MULTIMODAL, POOLING, Model
from sleb_serve.cli.main import main
from sleb_serve.roofline import cache
from sleb_serve.roofline.model import BYTES, Block, Cache, kv_tokens
from sleb_serve.roofline.sizes import read_model

LENGTH = 24
"""More tokens than the tiny models' sliding windows."""
QUICK = frozenset(
    ("llama", "gpt2", "falcon", "phi3", "gemma2", "mixtral", "gpt_oss", "granitemoe", "laguna")
    + ("deepseek_v3", "mimo_v2_flash", "mamba2", "nemotron_h", "jamba", "qwen3_next", "lfm2")
    + ("bert_embed", "qwen3_vl_moe-mm")
)
"""Of each way in which sizes or caches are said."""
NOT_ITS_OWN = frozenset(("qwen2_reward", "qwen2_process_reward"))
"""Whose head is no part of a model in Transformers."""
EXPANDED = frozenset(("minicpm3",))
"""Whose keys and values vLLM keeps expanded, and Transformers compressed."""
WITHOUT_CACHE = frozenset(("granite4_vision-mm",))
Folder = Callable[[str], Path]


def named(*left_out: frozenset[str]) -> list[str]:
    """Some of the models; all of them where tests are thorough."""
    tried = MODELS if THOROUGH else [name for name in MODELS if name in QUICK]
    return [name for name in tried if name not in frozenset().union(*left_out)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The checkpoint of a model of the matrix."""
    root = tmp_path_factory.mktemp("sizes")

    def saved(name: str) -> Path:
        if not (root / name).exists():
            MODELS[name].save(root / name)
        return root / name

    return saved


def in_transformers(model: Model) -> Any:
    """The model on the meta device, with random sizes of nothing."""
    import transformers

    if model.kind == MULTIMODAL:
        config = tiny_multimodal.make_config(model.name.removesuffix("-mm"))
    else:
        values = copy.deepcopy(model.tiny.values)
        config = getattr(transformers, model.tiny.config)(**values)
    with torch.device("meta"):
        return getattr(transformers, model.tiny.auto).from_config(config)


@pytest.mark.parametrize("name", named(NOT_ITS_OWN))
def test_parameters_and_bytes_are_those_of_transformers_and_of_the_file(
    name: str, folder: Folder
) -> None:
    path, model = folder(name), in_transformers(MODELS[name])
    kept = model.state_dict()
    buffers = sum(b.numel() for n, b in model.named_buffers() if n in kept)
    numbers = model.num_parameters() + buffers
    stored = sum(t.nbytes for file in path.glob("*.safetensors") for t in load_file(file).values())
    if MODELS[name].tiny.dtype == "float32":
        stored /= 2  # vLLM computes with it in 16 bit
    for found in (read_model(str(path)), read_model(str(path / "config.json"))):
        assert (found.parameters, found.stored) == (numbers, stored)


@pytest.mark.parametrize("name", named(NOT_ITS_OWN))
def test_a_config_alone_gives_the_blocks_of_the_checkpoint(name: str, folder: Folder) -> None:
    path = folder(name)
    assert read_model(str(path / "config.json")).blocks == read_model(str(path)).blocks


def elements(layer: Any) -> float:
    """Numbers that a layer of Transformers' cache holds, as vLLM keeps them."""
    total = 0.0
    for name, value in vars(layer).items():
        for tensor in value.values() if isinstance(value, dict) else [value]:
            if not torch.is_tensor(tensor) or tensor.ndim < 2:
                continue
            keys = name in {"keys", "values"}
            length = tensor.shape[-2 if keys else -1]
            # Transformers keeps one token less of a full window, and one more of a convolution.
            change = (keys and length < LENGTH) - ("conv" in name)
            total += tensor.numel() * (length + change) / length
    return total


@pytest.mark.parametrize(
    "name",
    [name for name in named(EXPANDED, WITHOUT_CACHE) if MODELS[name].kind != POOLING],
)
def test_caches_are_as_large_as_transformers_makes_them(name: str, folder: Folder) -> None:
    path = folder(name)
    model = MODELS[name].load(path)
    with torch.no_grad():
        out = model(input_ids=torch.arange(5, 5 + LENGTH)[None], use_cache=True)
    kept = getattr(out, "past_key_values", None) or out.cache_params
    for source in (path, path / "config.json"):
        found = [block.cache.size(LENGTH) / BYTES for block in read_model(str(source)).blocks]
        assert found == [elements(layer) for layer in kept.layers]


@pytest.mark.parametrize("form", ["int8", "fp8", "gptq", "awq"])
def test_quantised_weights_count_as_they_are_stored(
    form: str, models: Models, tmp_path: Path
) -> None:
    path = getattr(checkpoints, form)(models("llama"), tmp_path / form)
    stored = sum(t.nbytes for t in load_file(path / "model.safetensors").values())
    plain = read_model(str(models("llama")))
    for found in (read_model(str(path)), read_model(str(path / "config.json"))):
        assert found.stored == stored
        assert found.parameters == plain.parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_config_without_a_dtype_does_not_change_what_is_stored(
    dtype: torch.dtype, models: Models, tmp_path: Path
) -> None:
    config = json.loads((models("llama") / "config.json").read_text())
    config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(models("llama") / "model.safetensors")
    save_file({name: t.to(dtype) for name, t in tensors.items()}, tmp_path / "model.safetensors")
    found = read_model(str(tmp_path))
    assert found.stored == 2 * found.parameters == 2 * sum(t.numel() for t in tensors.values())


@pytest.mark.parametrize(
    ("quantisation", "expected"),
    [
        # A matrix of 256 x 128 has 2 x 1 blocks of 128 x 128, each with a float32 scale.
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 256 * 128 + 2 * 4),
        ({"quant_method": "mxfp4"}, 256 * 128 * 4),
    ],
)
def test_published_forms_are_sized_from_the_config(
    quantisation: dict[str, Any], expected: int, models: Models, tmp_path: Path
) -> None:
    config = json.loads((models("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "quantization_config": quantisation})
    )
    # Seven matrices a block: of attention 128 x 128, 64 x 128 twice, 128 x 128; of the MLP three.
    (block,) = set(read_model(str(tmp_path)).blocks)
    whole = 4 if quantisation["quant_method"] == "mxfp4" else 1
    small = 128 * 128 * whole + (4 if whole == 1 else 0)
    narrow = 64 * 128 * whole + (4 if whole == 1 else 0)
    down = expected  # 128 x 256: as many blocks
    norms = 2 * 128 * 4
    assert block.stored == 2 * small + 2 * narrow + 2 * expected + down + norms


def test_experts_quantised_alone_are_sized_alone(models: Models, tmp_path: Path) -> None:
    config = json.loads((models("gpt_oss") / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}})
    )
    plain = read_model(str(models("gpt_oss") / "config.json"))
    found = read_model(str(tmp_path))
    for before, after in zip(plain.blocks, found.blocks, strict=True):
        # Half a byte a number and a byte for 32 of them; the biases stay.
        matrices = 512 * 128 + 128 * 256
        biases = 512 + 128
        assert after.expert_stored == matrices * (0.5 + 1 / 32) + biases * 4
        assert after.stored == before.stored * 2  # not halved: a quantised model keeps its dtype


def test_what_cannot_be_sized_is_refused_by_name(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((models("llama") / "config.json").read_text())
    file = tmp_path / "config.json"
    for change, message in (
        ({"quantization_config": {"quant_method": "quip"}}, "the size of quip weights"),
        ({"model_type": "unheard-of"}, "Transformers does not know this kind of model"),
        ({"layer_types": ["full_attention"] * 7 + ["new"]}, "Transformers cannot read the config"),
    ):
        file.write_text(json.dumps({**config, **change}))
        assert main(["plan", str(file)]) == 2
        assert message in capsys.readouterr().err
    values = {**config, "layer_types": ["full_attention"] * 7 + ["new"]}
    with pytest.raises(Exception, match="no plan for a layer of kind 'new'"):
        cache.caches_of(values)


def test_a_batch_reads_the_experts_that_it_is_expected_to_choose() -> None:
    block = Block(0, 100, Cache(), experts=8, active=2, expert_parameters=5, expert_stored=10)
    source = random.Random(0)
    for tokens in (1, 3, 16):
        drawn = [
            len({e for _ in range(tokens) for e in source.sample(range(8), 2)})
            for _ in range(20000)
        ]
        assert block.read(tokens) == pytest.approx(100 + 10 * sum(drawn) / len(drawn), rel=5e-3)
    assert block.all_stored == 180


def test_windows_and_states_bound_what_a_sequence_takes() -> None:
    caches = [Cache(token=4, window=100), Cache(token=4), Cache(state=50)]
    # A sequence of 1,000 tokens takes 400 + 4,000 + 50 bytes.
    assert kv_tokens(44500, caches, 1000) == 10000
    assert kv_tokens(-1.0, caches) == 0
    assert Cache(token=4, window=100).size(30) == 120


def test_a_config_without_transformers_gives_the_caches_it_spells_out() -> None:
    values = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
    assert cache.caches_of(values) == (Cache(token=2 * 64 * BYTES, width=64),) * 2
    found = cache.caches_of({**values, "sliding_window": 8, "num_key_value_heads": 1})
    assert found == (Cache(token=2 * 16 * BYTES, window=8, width=64),) * 2


def test_a_hub_model_is_sized_from_the_headers_of_its_files(models: Models, tmp_path: Path) -> None:
    """Of a model that Transformers does not know, and whose weights are not on this machine."""
    source = models("llama")
    shard = tmp_path / "repository"
    shard.mkdir()
    config = json.loads((source / "config.json").read_text())
    (shard / "config.json").write_text(
        json.dumps({**config, "model_type": "unheard-of", "architectures": ["UnheardOf"]})
    )
    (shard / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with hub.serving("some/model", shard) as (url, _):
        (done,) = run_in_one(
            [["plan", "some/model", "--json"]],
            tmp_path,
            HF_ENDPOINT=url,
            HF_HUB_OFFLINE="0",
            HF_HOME=str(tmp_path / "home"),
        )
    assert done.code == 0, done.error
    found = json.loads(done.out)["model"]
    numbers = sum(t.numel() for t in load_file(source / "model.safetensors").values())
    assert found["parameters"] == numbers


@pytest.mark.parametrize("name", ["llama", "qwen3_next", "deepseek_v3"])
def test_a_changed_config_is_planned_or_refused_in_one_line(
    name: str, folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((folder(name) / "config.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(folder(name) / "model.safetensors")
    values: tuple[Any, ...] = (None, 0, -1, "x", [], {}, 1.5)
    for key in (*config, "quantization_config"):
        changed = {**config, key: values[len(key) % len(values)]}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        code = main(["plan", str(tmp_path), "--json"])
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if line.startswith("sleb-serve")]
        assert (code, len(errors)) in ((0, 0), (2, 1)), key
