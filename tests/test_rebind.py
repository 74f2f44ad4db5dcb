"""Manifests bound to another version of their model: serving and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
import oracle
from commands import Capture, refused, select_arguments
from conftest import Models
from engines import PROMPTS, Case, run_jobs
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.cli.main import main
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.manifest.schema import Origin
from sleb_serve.serving.command import pruned_overrides
from sleb_serve.serving.probe import TOLERANCE

FORMS = ("tuned", "int8", "fp8")


@dataclass(frozen=True)
class Bound:
    """A model, its manifest, and by form other weights of it and the manifest that is theirs."""

    model: Path
    manifest: Path
    forms: dict[str, Path]
    manifests: dict[str, Path]


@pytest.fixture(scope="module")
def bound(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Bound:
    folder, model = tmp_path_factory.mktemp("rebound"), models("llama")
    assert main(select_arguments(model, folder / "m.json")) == 0
    forms = {
        "tuned": tuned(model, folder / "tuned"),
        "int8": checkpoints.int8(model, folder / "int8"),
        "fp8": checkpoints.fp8(model, folder / "fp8"),
    }
    manifests = {name: folder / f"{name}.json" for name in forms}
    for name, path in forms.items():
        assert main(rebind_arguments(folder / "m.json", path, manifests[name], model)) == 0
    return Bound(model, folder / "m.json", forms, manifests)


def rebind_arguments(manifest: Path, model: Path, output: Path, origin: Path) -> list[str]:
    return ["rebind", str(manifest), str(model), "-o", str(output), "--origin", str(origin)]


def tuned(model: Path, folder: Path) -> Path:
    """A copy that was trained for a few steps."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    trained = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    ids = torch.randint(3, 259, (4, 48))
    for _ in range(5):
        trained(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    shutil.copytree(model, folder)
    trained.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_it_says_what_it_was_selected_on_and_binds_the_other(bound: Bound, form: str) -> None:
    first, other = read_manifest(bound.manifest), read_manifest(bound.manifests[form])
    assert [(r.block, r.loss) for r in other.removed] == [(r.block, r.loss) for r in first.removed]
    model = first.model
    assert other.rebound_from == Origin(
        model.id, model.revision, model.config_sha256, model.weights_sha256
    )
    found = open_checkpoint(str(bound.forms[form]))
    assert other.model.config_sha256 == found.config_sha256()
    assert other.model.weights_sha256 == found.weights_sha256() != model.weights_sha256
    assert other.pruning().digest != first.pruning().digest


def test_the_golden_prompt_is_measured_again(bound: Bound) -> None:
    first, other = read_manifest(bound.manifest).golden, read_manifest(bound.manifests["tuned"])
    golden = other.golden
    assert first is not None
    assert golden is not None
    assert golden.tokens == first.tokens
    assert golden.logprobs != first.logprobs
    expected = oracle.prompt_logprobs(
        oracle.pruned(bound.forms["tuned"], other.blocks), golden.tokens
    )
    assert golden.logprobs == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_another_form_is_served_as_its_physically_pruned_twin_and_known_by_its_prompt(
    bound: Bound, tmp_path: Path
) -> None:
    pytest.importorskip("vllm")
    jobs, goldens = {}, {}
    for form in FORMS:
        path, manifest = bound.forms[form], read_manifest(bound.manifests[form])
        pruning = manifest.pruning()
        assert manifest.golden is not None
        goldens[form] = manifest.golden
        asked = {"prompts": [*PROMPTS, list(manifest.golden.tokens)], "max_tokens": 4}
        overrides = pruned_overrides(pruning, open_checkpoint(str(path)))
        served = Case(form, pruning.removed).job(path, dtype="bfloat16")
        twin = checkpoints.compacted(path, tmp_path / f"{form}-twin", pruning.removed)
        jobs[form] = {**served, "overrides": overrides, **asked}
        jobs[f"{form} twin"] = {**Case("twin", ()).job(twin, dtype="bfloat16"), **asked}
    results = dict(zip(jobs, run_jobs(list(jobs.values()), tmp_path), strict=True))
    for form in FORMS:
        found, twin_found = results[form], results[f"{form} twin"]
        assert "error" not in found, found["error"]
        assert "error" not in twin_found, twin_found["error"]
        assert found["tokens"] == twin_found["tokens"]
        assert found["logprobs"] == twin_found["logprobs"]
        # As `probe` holds a server against the manifest.
        pairs = zip(found["logprobs"][-1], goldens[form].logprobs, strict=True)
        assert fmean(abs(a - b) for a, b in pairs) < TOLERANCE
    assert len({golden.logprobs for golden in goldens.values()}) == len(FORMS)


def config_change(**values: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **values}))

    return change


def tensor_change(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    return write


UP = "model.layers.3.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            config_change(architectures=["MistralForCausalLM"]),
            "architecture expected LlamaForCausalLM, found MistralForCausalLM",
        ),
        (
            config_change(num_hidden_layers=6),
            "number of decoder blocks expected 8, found 6",
        ),
        (
            config_change(intermediate_size=512),
            "in layer 0, mlp.intermediate_size is 256 there and 512 here",
        ),
        (config_change(vocab_size=1024), "outside the layers, lm_head.weight is (512, 128) there"),
        (
            config_change(attention_bias=True),
            "self_attn.k_proj.bias is None there and (64,) here",
        ),
        (
            tensor_change(lambda t: t.update({UP: t[UP][:100].clone()})),
            f"the tensor {UP} is [256, 128] there and [100, 128] here",
        ),
        (tensor_change(lambda t: t.pop(UP)), f"the tensor {UP} is there and not here"),
        (
            tensor_change(lambda t: t.update({f"{UP}_scale": torch.ones(1)})),
            f"the tensor {UP}_scale is here and not there",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_refused_by_name(
    bound: Bound,
    tmp_path: Path,
    capsys: Capture,
    change: Callable[[Path], None],
    message: str,
) -> None:
    other = shutil.copytree(bound.forms["tuned"], tmp_path / "other")
    change(other)
    output = tmp_path / "other.json"
    assert message in refused(rebind_arguments(bound.manifest, other, output, bound.model), capsys)
    assert not output.exists()


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("int8", lambda t: t.pop(UP), f"the tensor {UP} is there and not here"),
        (
            "fp8",
            lambda t: t.update({"model.layers.3.mlp.norm.weight": torch.ones(8)}),
            "the tensor model.layers.3.mlp.norm.weight is here and not there",
        ),
        ("gptq", lambda t: None, None),
        (
            "gptq",
            lambda t: t.pop(UP.replace("weight", "qweight")),
            f"the tensor {UP} is there and not here",
        ),
    ],
)
def test_a_quantised_forms_own_tensors_are_its_modules(
    bound: Bound,
    tmp_path: Path,
    capsys: Capture,
    form: str,
    change: Callable[[dict[str, Any]], None],
    message: str | None,
) -> None:
    """Without the golden prompt, whose measurement would stumble over a broken checkpoint, too."""
    other = getattr(checkpoints, form)(bound.model, tmp_path / form)
    tensor_change(change)(other)
    plain = tmp_path / "plain.json"
    replace(read_manifest(bound.manifest), golden=None).write(plain)
    asked = rebind_arguments(plain, other, tmp_path / "out.json", bound.model)
    if message is None:
        assert main(asked) == 0
    else:
        assert message in refused(asked, capsys)


def test_a_form_that_cannot_be_run_here_has_no_golden_prompt(
    bound: Bound, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sleb_serve.selection.memory

    monkeypatch.setattr(sleb_serve.selection.memory, "default_budget", lambda: 1 << 10)
    output = tmp_path / "out.json"
    asked = rebind_arguments(bound.manifest, bound.forms["fp8"], output, bound.model)
    assert main(asked) == 0
    assert "no golden prompt" in capsys.readouterr().err
    assert read_manifest(output).golden is None


def test_what_cannot_be_compared_is_refused(
    bound: Bound, models: Models, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "out.json"
    asked = rebind_arguments(bound.manifest, bound.forms["tuned"], output, bound.forms["int8"])
    line = refused(asked[:-2], capsys)
    assert "give its folder as --origin" in line
    line = refused(asked, capsys)
    assert "the manifest is for another model" in line
    same = rebind_arguments(bound.manifest, bound.model, output, bound.model)
    assert "is the manifest's own model" in refused(same, capsys)
    wrong = checkpoints.int8(models("mistral"), tmp_path / "mistral")
    line = refused(rebind_arguments(bound.manifest, wrong, output, bound.model), capsys)
    assert "architecture expected LlamaForCausalLM, found MistralForCausalLM" in line
    assert not output.exists()


def test_a_repair_does_not_carry_over(models: Models, tmp_path: Path, capsys: Capture) -> None:
    model, source, output = models("llama"), tmp_path / "m.json", tmp_path / "out.json"
    options = ["--repair", "fold", "--sequences", "4"]
    assert main(select_arguments(model, source, *options)) == 0
    results: dict[str, Any] = {"settings": {}, "results": []}
    replace(read_manifest(source), evaluation={"hf": results}).write(source)
    asked = rebind_arguments(source, tuned(model, tmp_path / "tuned"), output, model)
    capsys.readouterr()
    line = refused(asked, capsys)
    assert "repair (fold) was fitted to the weights of its own model" in line
    assert not output.exists()
    assert main([*asked, "--drop-repair"]) == 0
    said = capsys.readouterr()
    assert "the repair (fold) is left out" in said.err
    assert "the evaluation is the first model's and is left out" in said.err
    assert "losses are that model's" in said.out
    found = read_manifest(output)
    assert found.repairs == ()
    assert not found.evaluation
