"""The fast part of the equality matrix, and the support matrix against vLLM's models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import oracle
import tiny_hybrid
import tiny_multimodal
import tiny_pooling
import tiny_text
from conftest import ROOT
from engines import NEW_TOKENS, overrides, run_jobs
from matrix import (
    HYBRID,
    LIMIT,
    MODELS,
    MULTIMODAL,
    POOLING,
    SETS,
    TEXT,
    read,
    record,
    table,
    verdict,
)
from multimodal_images import image_answer, image_job
from sleb_serve.compat.architectures import status, support
from sleb_serve.protocol import FORMAT

pytest.importorskip("vllm")

RECORDS = ROOT / "benchmarks" / "records" / "architectures.jsonl"
FAST = {
    TEXT: ("mistral", "gemma3", "gpt2", "mixtral", "gpt_oss", "llama4", "minicpm3", "gemma4"),
    HYBRID: ("mamba2", "falcon_h1", "nemotron_h"),
    MULTIMODAL: ("llava-mm", "qwen2_vl-mm", "gemma4-mm", "internvl-mm"),
    POOLING: ("qwen3_embed", "llama_classify", "bert_embed"),
}
"""Models of each kind and each config format."""
NAMES = tuple(name for names in FAST.values() for name in names)
IMAGES = ("llava", "qwen2_5_vl", "idefics3", "internvl", "mistral3")


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Records of the fast part: dense and one set of blocks, every engine in one process."""
    root = tmp_path_factory.mktemp("matrix")
    models = [MODELS[name] for name in NAMES if MODELS[name].missing is None]
    sets = {model.name: (SETS[number % len(SETS)],) for number, model in enumerate(models)}
    jobs = []
    for model in models:
        model.save(root / model.name)
        jobs += [model.job(root / model.name, removed) for removed in ((), *sets[model.name])]
    results = run_jobs(jobs, root)
    return {
        model.name: record(model, root / model.name, results[2 * i : 2 * i + 2], sets[model.name])
        for i, model in enumerate(models)
    }


@pytest.mark.parametrize("name", NAMES)
def test_pruned_equals_transformers_with_the_blocks_skipped(
    name: str, entries: dict[str, dict[str, Any]]
) -> None:
    if (why := MODELS[name].missing) is not None:
        pytest.skip(why)
    entry = entries[name]
    assert verdict(entry) == "proven", entry
    for removed, said in entry["sets"].items():
        gone = {int(block) for block in removed.split("-")}
        count = len(said["layers"]) + len(gone)
        assert said["layers"] == [block for block in range(count) if block not in gone]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """By family: the model, and what an engine without two blocks says to an image."""
    pytest.importorskip("torchvision")
    root = tmp_path_factory.mktemp("images")
    removed = {**dict.fromkeys(IMAGES, (1, 3)), "qwen3_vl_deepstack": (3, 5)}
    jobs = []
    for name, blocks in removed.items():
        tiny_multimodal.save(name, root / name)
        job = image_job(name, root / name)
        engine = {**job["engine"], "config_format": FORMAT, "load_format": FORMAT}
        jobs.append({**job, "engine": engine, "overrides": overrides(root / name, blocks)})
    results = run_jobs(jobs, root)
    return {name: (root / name, result) for name, result in zip(removed, results, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*IMAGES, "qwen3_vl_deepstack"])
def test_an_image_in_the_prompt_is_seen_as_transformers_sees_it(
    name: str, shown: dict[str, tuple[Path, dict[str, Any]]]
) -> None:
    path, result = shown[name]
    assert "error" not in result, result["error"]
    removed = (1, 3) if name in IMAGES else (3, 5)
    model = oracle.skip_blocks(oracle.load(path), removed)
    (tokens,) = result["tokens"]
    expected = image_answer(name, path, model, tokens)
    assert result["prompts"] == expected["prompts"]
    assert len(tokens) == NEW_TOKENS
    assert max(expected["behind"]) < LIMIT["float32"]
    for found, known in zip(result["logprobs"][0], expected["logprobs"][0], strict=True):
        assert abs(found - known) < LIMIT["float32"]


def test_a_block_that_a_vision_tower_feeds_is_refused(tmp_path: Path) -> None:
    from sleb_serve.checkpoint.hub import open_checkpoint
    from sleb_serve.cut.config import Cut
    from sleb_serve.cut.servable import check_servable
    from sleb_serve.errors import SlebError

    if MODELS["qwen3_vl_deepstack-mm"].missing is not None:
        pytest.skip("needs torchvision")
    tiny_multimodal.save("qwen3_vl_deepstack", tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    assert check_servable(checkpoint, Cut(6, (2, 3)))
    with pytest.raises(SlebError, match=r"block 1 receives the vision tower's features"):
        check_servable(checkpoint, Cut(6, (1, 3)))


def test_what_is_called_proven_is_what_the_records_prove() -> None:
    known = read([str(RECORDS)])
    proven = {entry["architecture"] for entry in known if verdict(entry) == "proven"}
    assert {name for name, row in support().items() if row["status"] == "proven"} == proven
    assert len(proven) >= 110
    assert not [entry["architecture"] for entry in known if verdict(entry) == "WRONG"]
    # What is refused in the records or by name is not called proven or expected for no reason.
    for entry in known:
        if entry["architecture"] not in proven and verdict(entry) == "refused":
            assert status(entry["architecture"])[0] == "refused", entry["architecture"]


def test_the_table_is_made_of_the_records() -> None:
    text = RECORDS.with_suffix(".md").read_text()
    made = table(read([str(RECORDS)]))
    # The versions are those of the day.
    assert text.split("## ", 1)[1] == made.split("## ", 1)[1]


def test_every_decoder_of_this_vllm_is_accounted_for() -> None:
    """In the data, or as a model that was tried and differs already when dense."""
    from vllm.model_executor.models import registry

    text = registry._TEXT_GENERATION_MODELS.keys() | registry._TRANSFORMERS_SUPPORTED_MODELS.keys()
    tried = {
        *tiny_hybrid.NOT_EQUAL,
        *tiny_multimodal.NOT_EQUAL,
        *tiny_pooling.NOT_EQUAL,
        *tiny_text.NOT_EQUAL,
    }
    unknown = {name for name in text if name.endswith("ForCausalLM")} - support().keys() - tried
    assert unknown == {"HCXVisionV2ForCausalLM"}  # multimodal
