"""The plugin reads nothing of a removed layer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import hub
import oracle
from conftest import Models
from engines import Case, check_equal, pruning, run_jobs
from sleb_serve.checkpoint.hub import open_checkpoint

pytest.importorskip("vllm")


@pytest.fixture
def sharded(models: Models, tmp_path: Path) -> Path:
    """The Llama model in four shards, the second of which holds blocks 2 and 3 and nothing else."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(models("llama"), tmp_path / "sharded")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {"2": 1, "3": 1, "4": 2, "5": 2, "6": 3, "7": 3}
    weight_map: dict[str, str] = {}
    for shard in range(4):
        file = f"model-0000{shard + 1}-of-00004.safetensors"
        held = {
            n: t for n, t in tensors.items() if places.get("".join(n.split(".")[2:3]), 0) == shard
        }
        save_file(held, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_shard_of_removed_layers_alone_need_not_be_there(
    sharded: Path, models: Models, tmp_path: Path
) -> None:
    """What is not there cannot have been opened; and no tensor of a removed layer is read."""
    jobs = [
        Case("sharded", (2, 3)).job(sharded),
        Case("sharded", (2, 3, 6)).job(sharded),
        Case("sharded", (2,)).job(sharded),
        Case("sharded", (2, 3, 6)).job(models("llama")),
    ]
    shard = sharded / "model-00002-of-00004.safetensors"
    shard.unlink()
    two, three, refused, whole = run_jobs(jobs, tmp_path)
    check_equal(two, models("llama"), Case("llama", (2, 3)))
    check_equal(three, models("llama"), Case("llama", (2, 3, 6)))
    assert f"lacks the checkpoint shard {shard.name}" in refused["error"]
    model = oracle.pruned(models("llama"), (2, 3, 6))
    for result in (three, whole):
        assert result["ranks"][0]["weights_read_bytes"] == 4 * oracle.parameter_counts(model)[1]


def test_a_shard_of_removed_layers_alone_is_not_downloaded(
    sharded: Path, models: Models, tmp_path: Path
) -> None:
    """From a hub on this machine, into an empty cache."""
    job = Case("sharded", (2, 3)).job(sharded)
    with hub.serving("org/sharded", sharded) as (address, fetched):
        (result,) = run_jobs(
            [{**job, "model": "org/sharded"}],
            tmp_path,
            **hub.environment(address, tmp_path / "hub"),
        )
    check_equal(result, models("llama"), Case("llama", (2, 3)))
    shards = {f"model-0000{i}-of-00004.safetensors" for i in (1, 3, 4)}
    assert {name for name in fetched if name.endswith(".safetensors")} == shards


def test_tensors_of_removed_layers_are_never_asked_for(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through vLLM's own reader, with the safetensors library watched."""
    import safetensors
    from vllm.model_executor.model_loader import weight_utils

    from sleb_vllm.loader import only_needed

    asked: list[str] = []

    class Watched:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file: Any = safetensors.safe_open(*args, **kwargs)

        def __enter__(self) -> Watched:
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def keys(self) -> list[str]:
            return list(self.file.keys())

        def get_tensor(self, name: str) -> Any:
            asked.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(weight_utils, "safe_open", Watched)
    path = models("llama")
    files = [str(path / "model.safetensors")]
    with only_needed(open_checkpoint(str(path)), pruning(path, (2, 5))):
        read = dict(weight_utils.safetensors_weights_iterator(files, use_tqdm_on_load=False))
    assert list(read) == asked
    blocks = {int(name.split(".")[2]) for name in asked if ".layers." in name}
    assert blocks == {0, 1, 3, 4, 6, 7}
    everything = dict(weight_utils.safetensors_weights_iterator(files, use_tqdm_on_load=False))
    assert set(everything) - set(read) == {
        name for name in everything if name.startswith(("model.layers.2.", "model.layers.5."))
    }
