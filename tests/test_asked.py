"""What vLLM is asked for beside the manifest, and what is refused of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from changed_weights import flip_middle, rewrite, weight
from conftest import Models
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.errors import SlebError
from sleb_serve.manifest.asked import check_dense, check_only, check_source
from sleb_serve.manifest.binding import bind, check_again
from sleb_serve.manifest.schema import Manifest, Removal

PRUNED = SimpleNamespace(hf_config=SimpleNamespace(sleb={"removed": [1]}))
NAME = "m-sleb3-1a2b3c4d"


def dense(**changes: Any) -> Any:
    values = {"config_format": "auto", "served_model_name": "m", "model": "org/m"}
    return SimpleNamespace(hf_config=SimpleNamespace(), **{**values, **changes})


def asked(draft: Any = None, target: Any = None) -> Any:
    pair = SimpleNamespace(draft_model_config=draft, target_model_config=target)
    return SimpleNamespace(speculative_config=pair if draft or target else None)


@pytest.mark.parametrize(
    ("model", "load_format", "message"),
    [
        (dense(), "auto", None),
        (dense(), "sleb", "--load-format sleb was given without a manifest"),
        (dense(config_format="sleb"), "auto", "--config-format sleb was given without"),
        (dense(served_model_name=NAME), "auto", f"{NAME} is a pruned model's"),
        (dense(served_model_name=f"{NAME}e"), "auto", None),
        (dense(served_model_name=NAME, model=NAME), "auto", None),
    ],
)
def test_a_dense_model_is_refused_where_a_pruned_one_is_asked_for(
    model: Any, load_format: str, message: str | None
) -> None:
    for other in (asked(), asked(dense(), model)):
        if message is None:
            check_dense(other, model, load_format)
        else:
            with pytest.raises(SlebError, match=message):
                check_dense(other, model, load_format)
    # As the target of a pruned draft, or the draft of a pruned target.
    check_dense(asked(PRUNED, model), model, load_format)
    check_dense(asked(model, PRUNED), model, load_format)


def test_an_exported_model_may_have_a_pruned_models_name(tmp_path: Path) -> None:
    model = dense(served_model_name=NAME, model=str(tmp_path))
    with pytest.raises(SlebError, match="or another name"):
        check_dense(asked(), model, "auto")
    (tmp_path / "sleb_manifest.json").touch()
    check_dense(asked(), model, "auto")


def test_other_weights_and_classes_are_refused() -> None:
    check_only(SimpleNamespace())
    check_only(SimpleNamespace(model_weights="", model_class_overrides={}))
    with pytest.raises(SlebError, match="--model-weights s3://m cannot be checked"):
        check_only(SimpleNamespace(model_weights="s3://m"))
    with pytest.raises(SlebError, match="--model-class-overrides"):
        check_only(SimpleNamespace(model_class_overrides={"A": "b:C"}))


def test_a_hubs_model_comes_from_the_hub_that_it_is_compared_on(tmp_path: Path) -> None:
    check_source("org/m", False)
    check_source(str(tmp_path), True)
    with pytest.raises(SlebError, match="VLLM_USE_MODELSCOPE is set"):
        check_source("org/m", True)


def test_another_models_weights_are_not_loaded_into_a_running_one(
    models: Models, tmp_path: Path
) -> None:
    path = models("llama")
    manifest = Manifest(bind(str(path), open_checkpoint(str(path))), (Removal(1),))
    pruning = manifest.pruning()
    check_again(open_checkpoint(str(path)), str(path), pruning)
    with pytest.raises(SlebError, match="architecture expected"):
        check_again(open_checkpoint(str(models("opt"))), "opt", pruning)
    other = tmp_path / "other"
    shutil.copytree(path, other)
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + bytes(8))
    with pytest.raises(SlebError, match="weights_sha256 expected"):
        check_again(open_checkpoint(str(other)), str(other), pruning)


def test_other_weights_that_only_the_full_digest_tells_are_not_loaded_either(
    models: Models, tmp_path: Path
) -> None:
    path, other = models("llama"), tmp_path / "other"
    manifest = Manifest(bind(str(path), open_checkpoint(str(path)), full=True), (Removal(1),))
    shutil.copytree(path, other)
    rewrite(other, flip_middle(weight(2)))
    again = open_checkpoint(str(other))
    check_again(again, str(other), manifest.pruning())
    check_again(open_checkpoint(str(path)), str(path), manifest.pruning(full=True))
    with pytest.raises(SlebError, match="the full digest of block 2 differs"):
        check_again(again, str(other), manifest.pruning(full=True))
