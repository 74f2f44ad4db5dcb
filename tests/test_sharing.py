"""Sharing a dense model's modules with a draft that skips some of its layers."""

from __future__ import annotations

import gc
import os
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from conftest import Models
from engines import pruning
from sleb_serve.cut.config import Cut
from sleb_serve.manifest.pruning import RepairFile
from sleb_serve.manifest.sharing import Lender, Loaded, parameter_bytes, share

CUT = Cut(4, (0, 2))
WIDTH = 6


class Attention(nn.Module):
    """Has parameters and, by its entry in the engine's context, a state."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.zeros(WIDTH))


class Layer(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        for parameter in self.parameters():
            nn.init.constant_(parameter, number)


class Decoder(nn.Module):
    """A decoder of layers whose weights are all their number in the dense model."""

    def __init__(self, numbers: tuple[int, ...]) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, WIDTH)
        nn.init.ones_(self.embed.weight)
        self.layers = nn.ModuleList(map(Layer, numbers))


class Model(nn.Module):
    def __init__(self, *numbers: int) -> None:
        super().__init__()
        self.decoder = Decoder(numbers)
        self.head = self.decoder.embed  # tied

    def states(self) -> dict[str, Any]:
        return {f"{id(self)}.{i}": layer.attention for i, layer in enumerate(self.layers)}

    @property
    def layers(self) -> Any:
        return self.decoder.layers


def pair(cut: Cut = CUT) -> tuple[Model, Model]:
    return Model(*cut.kept), Model(*range(cut.num_blocks))


def shared(draft: Model, target: Model) -> frozenset[str]:
    states = {**draft.states(), **target.states()}
    return share(draft, target, "decoder.layers", CUT, states)


def test_each_kept_layer_is_the_dense_models_by_its_old_number() -> None:
    draft, target = pair()
    sizes = parameter_bytes(draft)
    names = shared(draft, target)
    for new, old in enumerate((1, 3)):
        assert draft.layers[new].up is target.layers[old].up
        assert draft.layers[new].norm is target.layers[old].norm
        assert draft.layers[new].attention is not target.layers[old].attention
    assert draft.decoder.embed is target.decoder.embed is draft.head
    own = {f"decoder.layers.{i}.attention.sinks" for i in range(2)}
    assert {name for name in sizes if name.rpartition(".")[0] not in names} == own
    assert sum(sizes.values()) == 4 * (3 * WIDTH + 2 * (WIDTH * WIDTH + 4 * WIDTH))


def test_what_was_replaced_is_freed() -> None:
    draft, target = pair()
    gone = weakref.ref(draft.layers[1].up)
    shared(draft, target)
    gc.collect()
    assert gone() is None


class Other(nn.Linear):
    """Another class with a linear layer's tensors."""


def _bits(target: Model) -> None:
    with torch.no_grad():
        target.layers[3].up.weight[1, 2] += 1e-6


def _dtype(target: Model) -> None:
    target.layers[3].up.to(torch.float64)


def _shape(target: Model) -> None:
    target.layers[3].up = nn.Linear(WIDTH, WIDTH + 1)


def _kind(target: Model) -> None:
    other = Other(WIDTH, WIDTH)
    other.load_state_dict(target.layers[3].up.state_dict())
    target.layers[3].up = other


def _setting(target: Model) -> None:
    target.layers[3].up.in_features += 1


def _bias(target: Model) -> None:
    target.layers[3].up.bias = None


def _buffer(target: Model) -> None:
    target.layers[3].up.register_buffer("scale", torch.ones(1))


@pytest.mark.parametrize("change", [_bits, _dtype, _shape, _kind, _setting, _bias, _buffer])
def test_a_module_that_differs_stays_the_drafts(change: Callable[[Model], None]) -> None:
    draft, target = pair()
    own = draft.layers[1].up
    change(target)
    names = shared(draft, target)
    assert draft.layers[1].up is own
    assert "decoder.layers.1.up" not in names
    assert {"decoder.layers.0.up", "decoder.layers.1.norm"} <= names


def test_tensors_without_memory_are_not_shared() -> None:
    draft, target = pair()
    for model, number in ((draft, 0), (target, 1)):
        model.layers[number].up.to("meta")
    assert "decoder.layers.0.up" not in shared(draft, target)


def test_not_a_number_equals_itself() -> None:
    draft, target = pair()
    for model, number in ((draft, 0), (target, 1)):
        nn.init.constant_(model.layers[number].up.weight, float("nan"))
    assert "decoder.layers.0.up" in shared(draft, target)


def test_a_module_with_another_inside_is_shared_if_that_has_no_parameters() -> None:
    draft, target = pair()
    for number, model in ((0, draft), (1, target)):
        model.layers[number].up.method = nn.Identity()
        model.layers[number].norm.method = nn.Linear(1, 1)
    names = shared(draft, target)
    assert draft.layers[0].up is target.layers[1].up
    assert "decoder.layers.0.norm" not in names


def test_a_layer_with_an_adapter_lends_what_is_in_it() -> None:
    draft, target = pair()
    wrapped = nn.Module()
    wrapped.base_layer = target.layers[1].up
    target.layers[1].up = wrapped
    shared(draft, target)
    assert draft.layers[0].up is wrapped.base_layer


@pytest.fixture(scope="module")
def folders(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint; links to its files; and a copy of it."""
    dense, root = models("llama"), tmp_path_factory.mktemp("folders")
    shutil.copytree(dense, root / "copy")
    (root / "links").mkdir()
    for file in dense.iterdir():
        os.symlink(file, root / "links" / file.name)
    return {"dense": dense, "links": root / "links", "copy": root / "copy"}


def said(folders: dict[str, Path], folder: str = "links", **changes: Any) -> str:
    """What the log says of a draft in a folder; changes are of the engine or of its models."""
    cut = replace(pruning(folders["dense"], (2, 5)), repair=changes.get("repair"))
    draft, target = pair(cut.cut)
    path, given = folders[folder], {"dtype": torch.bfloat16, "quantization": None, "revision": None}

    def loaded(model: Path, runner: str, config: Any, load_format: str, **other: Any) -> Loaded:
        fields = {**given, **other, "model": str(model), "runner_type": runner}
        return Loaded(SimpleNamespace(hf_config=config, **fields), load_format, None)

    own = loaded(path, "draft", SimpleNamespace(sleb=cut.to_dict()), "hf", **changes.get("of", {}))
    dense = loaded(folders["dense"], "generate", SimpleNamespace(), changes.get("format", "auto"))
    states = {} if changes.get("other_engine") else {**draft.states(), **target.states()}
    engine = SimpleNamespace(
        speculative_config=SimpleNamespace(draft_model_config=own.model_config),
        compilation_config=SimpleNamespace(static_forward_context=states),
        cache_config=SimpleNamespace(cpu_offload_gb=changes.get("offload", 0)),
        parallel_config=SimpleNamespace(enable_eplb=changes.get("eplb", False)),
    )
    draft.hf_to_vllm_mapper = SimpleNamespace(path="decoder.layers")
    lender, before = Lender(), draft.layers[0].norm
    if not changes.get("forgotten"):
        lender.remember(target, engine, dense)
    text = lender.share(draft, parameter_bytes(draft), engine, own)
    assert ("keeps weights of its own" in text) == (draft.layers[0].norm is before)
    return text


def test_links_to_the_same_files_are_shared(folders: dict[str, Path]) -> None:
    assert "shares" in said(folders)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"folder": "copy"}, "its files are not those of the dense model"),
        ({"of": {"dtype": torch.float32}}, "its dtype is torch.float32, the dense model's"),
        ({"of": {"quantization": "fp8"}}, "its quantization is fp8, the dense model's None"),
        ({"format": "dummy"}, "was loaded by dummy"),
        ({"format": "sharded_state"}, "was loaded by sharded_state"),
        ({"repair": RepairFile("fold", "0" * 64, "x")}, "the manifest's fold changes some"),
        ({"offload": 1}, "weights are offloaded"),
        ({"eplb": True}, "--enable-eplb moves experts"),
        ({"other_engine": True}, "no dense model was loaded before it"),
        ({"forgotten": True}, "no dense model was loaded before it"),
    ],
)
def test_other_weights_are_not_shared(
    folders: dict[str, Path], changes: dict[str, Any], why: str
) -> None:
    assert why in said(folders, **changes)


def test_a_folder_with_mistrals_files_may_have_been_read_from_these(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    both = tmp_path / "both"
    shutil.copytree(folders["links"], both, symlinks=True)
    (both / "consolidated.safetensors").touch()
    changed = {**folders, "dense": both}
    assert "Mistral" in said(changed)
    assert "shares" in said(changed, format="hf")
