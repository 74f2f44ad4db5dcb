"""Perplexity and tasks of pruned models, against plain Transformers and plain lm-eval."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import oracle
from commands import refused
from conftest import Models
from engines import PROMPTS
from exports import manifest_for
from judging import evaluated, needs_data, short_text, use_data
from repairs import manifest_of, repaired
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.cli.main import main
from sleb_serve.data import questions
from sleb_serve.data.calibration import judged_sequences
from sleb_serve.data.tokenizer import load_tokenizer
from sleb_serve.evaluation.report import describe
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.manifest.repair_file import read_sidecar, sidecar_path
from sleb_serve.models.loading import load_model
from sleb_serve.models.pruned import blocks_deleted

Capture = pytest.CaptureFixture[str]
REMOVED = (5, 2, 3)


@pytest.fixture(autouse=True)
def data(monkeypatch: pytest.MonkeyPatch) -> None:
    use_data(monkeypatch)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return short_text(tmp_path)


def perplexity_of(model: Any, path: Path, text: Path, length: int) -> float:
    """By the official protocol, in as few words as possible."""
    ids = load_tokenizer(open_checkpoint(str(path)))(text.read_text())
    sequences = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    return math.exp(oracle.loss(model, sequences))


def agreement_of(dense: Any, model: Any, path: Path, text: Path, length: int) -> float:
    """How often the likeliest next token is the dense model's."""
    ids = load_tokenizer(open_checkpoint(str(path)))(text.read_text())
    equal = []
    for start in range(0, len(ids) - length + 1, length):
        part = torch.tensor([ids[start : start + length]])
        with torch.no_grad():
            one, two = (m(part, use_cache=False).logits[0, :-1].argmax(-1) for m in (dense, model))
        equal += (one == two).tolist()
    return sum(equal) / len(equal)


def calibration_error_of(model: Any, path: Path, text: Path, length: int) -> float:
    """Of each fifteenth of what it may be sure of: how sure it is, and how often it is right."""
    ids = load_tokenizer(open_checkpoint(str(path)))(text.read_text())
    bins: dict[int, list[tuple[float, bool]]] = {}
    for start in range(0, len(ids) - length + 1, length):
        part = ids[start : start + length]
        with torch.no_grad():
            logits = model(torch.tensor([part]), use_cache=False).logits[0, :-1].double()
        for row, right in zip(logits.softmax(-1), part[1:], strict=True):
            sure, token = row.max(0)
            bins.setdefault(int(sure * 15), []).append((float(sure), int(token) == right))
    count = sum(map(len, bins.values()))
    return (
        sum(abs(sum(sure - right for sure, right in entries)) for entries in bins.values()) / count
    )


def answers_of(dense: Any, model: Any, path: Path) -> tuple[float, float]:
    """Both models generate, token by token without a cache: how far the answers are the same."""
    ends = dense.generation_config.eos_token_id
    pairs = []
    for question in questions.question_prompts(load_tokenizer(open_checkpoint(str(path)))):
        one, two = (until(oracle.greedy(m, question, 32), ends) for m in (dense, model))
        same = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), None)
        same = min(len(one), len(two)) if same is None else same
        pairs.append((one == two, same / len(one)))
    whole, tokens = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    return whole, tokens


def until(tokens: list[int], end: int | None) -> list[int]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt", "bloom"])
def test_a_frontiers_perplexities_are_those_of_models_with_the_blocks_deleted(
    models: Models,
    tmp_path: Path,
    text: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setattr(questions, "QUESTIONS", questions.QUESTIONS[:3])
    path, removed = models(name), REMOVED if name == "llama" else (2, 3, 1)
    output = tmp_path / "e.json"
    options = ["--removal-list", str(list(removed)), "--blocks", "2,0,3"]
    options += ["--perplexity", str(text), "--sequence-length", "50"]
    report = evaluated(path, output, *options, answers=True)
    assert [entry["blocks"] for entry in report["results"]] == [2, 0, 3]
    for entry in report["results"]:
        model = oracle.pruned(path, removed[: entry["blocks"]])
        expected = perplexity_of(model, path, text, 50)
        assert entry["perplexity"][str(text)] == pytest.approx(expected, rel=1e-5)
        agreement = agreement_of(oracle.load(path), model, path, text, 50)
        # A tie between two tokens may fall either way.
        assert entry["agreement"].get(str(text), 1.0) == pytest.approx(agreement, abs=0.01)
        assert (str(text) in entry["agreement"]) == (entry["blocks"] > 0)
        error = calibration_error_of(model, path, text, 50)
        assert entry["calibration_error"][str(text)] == pytest.approx(error, abs=1e-3)
        if entry["blocks"]:
            whole, tokens = answers_of(oracle.load(path), model, path)
            assert entry["answers"]["whole"] == pytest.approx(whole)
            assert entry["answers"]["tokens"] == pytest.approx(tokens)
        else:
            assert entry["answers"] == {}
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr()
    assert f"{report['results'][2]['perplexity'][str(text)]:.2f}" in shown.out
    assert "perplexity does not show" in shown.err


def test_repaired_models_are_judged_repaired_and_the_model_is_left_as_it_was(
    models: Models, tmp_path: Path
) -> None:
    path, removed = models("llama"), (2, 3, 6)
    manifest = manifest_of(path, removed, tmp_path / "m.json")
    tensors = load_file(sidecar_path(tmp_path / "m.json"))
    model: Any = load_model(open_checkpoint(str(path)), "float32")
    ids = torch.tensor([PROMPTS[0]])
    before = model(ids).logits
    with blocks_deleted(model, removed, read_sidecar(manifest.pruning())):
        found = model(ids).logits
        generated = model.generate(ids, max_new_tokens=5, do_sample=False)
    expected = repaired(path, removed, tensors)
    assert (found - expected(ids, use_cache=False).logits).abs().max() < 1e-4
    assert (found - before).abs().max() > 1e-2
    assert generated[0, len(PROMPTS[0]) :].tolist() == oracle.greedy(expected, PROMPTS[0], 5)
    assert torch.equal(model(ids).logits, before)


def test_an_interrupted_frontier_resumes(
    models: Models,
    tmp_path: Path,
    text: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(questions, "QUESTIONS", questions.QUESTIONS[:3])
    path, output = models("llama"), tmp_path / "e.json"
    options = ["--removal-list", str(list(REMOVED)), "--blocks", "0,1,3"]
    options += [
        "--perplexity",
        f"{text},python-docs",
        "--sequence-length",
        "40",
        "--sequences",
        "2",
    ]
    whole = evaluated(path, output, *options, answers=True)
    partial = json.loads(output.read_text())
    partial["results"][1]["perplexity"].popitem()
    partial["results"][2]["perplexity"].clear()
    partial["results"][0]["perplexity"][str(text)] = 12345.0  # to see that it is kept
    output.write_text(json.dumps(partial))
    capsys.readouterr()
    again = evaluated(path, output, *options, "--resume", answers=True)
    assert capsys.readouterr().err.count("(resumed)") == 5
    assert again["results"][0]["perplexity"].pop(str(text)) == 12345.0
    whole["results"][0]["perplexity"].pop(str(text))
    assert again == whole
    arguments = ["eval", str(path), "-o", str(output), *options[:-1], "3", "--resume"]
    assert "is of another evaluation" in refused(arguments, capsys)


def test_results_go_back_into_the_manifest(models: Models, tmp_path: Path, text: Path) -> None:
    path, file = models("llama"), tmp_path / "m.json"
    manifest_for(path, REMOVED).write(file)
    options = ["-m", str(file), "--blocks", "0,3", "--perplexity", str(text), "--write-back"]
    options += ["--sequence-length", "40"]
    report = evaluated(path, tmp_path / "e.json", *options, answers=True)
    manifest = read_manifest(file)
    assert manifest.blocks == REMOVED
    assert manifest.pruning() == manifest_for(path, REMOVED).pruning()
    assert manifest.evaluation["hf"]["results"] == report["results"]
    pruned = report["results"][1]
    (line,) = (line for line in describe(manifest).splitlines() if line.startswith("evaluated"))
    assert line.startswith(f"evaluated    {pruned['verdict']}: 3 removed (hf): perplexity ")
    assert f"{pruned['answers']['tokens']:.1%} of the dense model's answers" in line


def test_what_cannot_be_judged_is_refused(
    models: Models, tmp_path: Path, text: Path, capsys: Capture
) -> None:
    path = str(models("llama"))
    other = tmp_path / "m.json"
    manifest_for(models("opt"), (2,)).write(other)
    short = tmp_path / "short.txt"
    short.write_text("short")
    picture = tmp_path / "picture.txt"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    for options, message in (
        (["--tasks", "no_such_task"], "lm-eval has no task no_such_task"),
        (["--perplexity", str(picture)], "is not UTF-8"),
        (["--perplexity", "nowhere.txt"], "cannot read text nowhere.txt"),
        (["--perplexity", str(short)], "less than one sequence"),
        (["--perplexity", str(text), "--sequence-length", "1"], "at least 2 tokens"),
        (["--perplexity", str(text), "--sequence-length", "513"], "model's context of 512 tokens"),
        (["-m", str(other), "--perplexity", str(text)], "the manifest is for another model"),
        (["--blocks", "2"], "which blocks?"),
        (["--removal-list", "[2]", "--blocks", "0,2"], "between 1 and 1"),
        (["--removal-list", "[2]", "--blocks", "1,1"], "each once"),
        (["--removal-list", "[2]", "--write-back"], "give one with -m"),
    ):
        assert message in refused(["eval", path, *options], capsys)


@needs_data
def test_wikitext_is_cut_as_the_official_code_cuts_it(models: Models) -> None:
    from datasets import load_dataset

    tokenize = load_tokenizer(open_checkpoint(str(models("llama"))))
    rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"]
    ids = tokenize("\n\n".join(rows))
    sequences = judged_sequences("wikitext2", tokenize, 2048)
    assert len(sequences) == len(ids) // 2048
    assert [token for sequence in sequences for token in sequence] == list(
        ids[: len(sequences) * 2048]
    )


@needs_data
def test_what_the_readme_maps_the_official_commands_to_runs(
    models: Models, tmp_path: Path, capsys: Capture
) -> None:
    """But C4, which is not among the data sets here, and on fewer rows and sequences."""
    path, output = str(models("llama")), str(tmp_path / "m.json")
    select = ["select", path, "-o", output, "--remove", "2", "--rows", "16", "--seed", "0"]
    select += ["--calibration", "wikitext2", "--early-barrier", "1", "--late-barrier", "1"]
    assert main([*select, "--sequences", "2", "--sequence-length", "64"]) == 0
    judge = ["--perplexity", "wikitext2", "--sequence-length", "64", "--sequences", "2"]
    judge += ["--no-answers"]
    assert main(["eval", path, "-m", output, *judge]) == 0
    blocks = list(read_manifest(Path(output)).blocks)
    capsys.readouterr()
    listed = ["eval", path, "--removal_list", str(blocks), *judge, "--tasks", "piqa"]
    assert main([*listed, "--limit", "2", "--json", "-o", str(tmp_path / "e.json")]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((tmp_path / "e.json").read_text())
    assert shown["results"][0]["removed"] == blocks
