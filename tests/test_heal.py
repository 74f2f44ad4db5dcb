"""Healing: its gradient, its result and its ends, against two models and PEFT's own merge."""

from __future__ import annotations

import math
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import oracle
from commands import one_thread, run_in_two
from conftest import Models, save_model
from forking import run_fork
from healing import COMMAND, REMOVED, SMALL, Told, healed, merged_by_peft, oracle_of, removing
from memory import status
from sleb_serve import HealConfig, heal
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.cli.main import main
from sleb_serve.convert.export import export
from sleb_serve.data.tokenizer import load_tokenizer
from sleb_serve.data.training import Passage, make_mixture
from sleb_serve.errors import SlebError
from sleb_serve.healing.distillation import goal_of, judge, judgement, learn, predicted
from sleb_serve.healing.twin import Twin, adaptable
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.manifest.repair_file import LORA_A, LORA_B, read_sidecar, sidecar_path
from sleb_serve.models.loading import has_fast, load_model
from sleb_serve.models.pruned import blocks_deleted
from sleb_serve.selection.memory import peak_bytes
from sweeps import random_windows


def twin_of(path: Path, removed: tuple[int, ...] = REMOVED, **options: Any) -> Twin:
    """A twin whose adapters are not at zero."""
    checkpoint = open_checkpoint(str(path))
    model = load_model(checkpoint, "float32")
    kept = [block for block in range(checkpoint.num_blocks) if block not in removed]
    names = adaptable(model, checkpoint, kept, None)
    twin = Twin(model, removed, names, **{"rank": 4, "seed": 3, "checkpointing": False, **options})
    torch.manual_seed(7)
    for name, factor in twin.factors.items():
        if name.endswith(LORA_B):
            torch.nn.init.normal_(factor, std=0.05)
    return twin


def passages(count: int, length: int = 24) -> list[Passage]:
    """Random tokens, of which some do not count."""
    windows = random_windows(count, length)
    counts = bytes(i % 5 != 3 for i in range(length))
    return [Passage(array("i", window), counts) for window in windows]


def expected_gradients(
    path: Path, removed: tuple[int, ...], factors: dict[str, torch.Tensor], text: list[Passage]
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and its gradients with two models in memory and all logits at once."""
    teacher, student = oracle.load(path), merged_by_peft(path, removed, factors)
    ids = torch.tensor([list(passage.tokens) for passage in text])
    counts = torch.tensor([list(p.counts) for p in text]).bool()[:, 1:]
    weights = dict(student.named_parameters())
    for weight in weights.values():
        weight.requires_grad_()
    with torch.no_grad():
        goal = teacher(ids, use_cache=False).logits[:, :-1][counts].log_softmax(-1)
    given = student(ids, use_cache=False).logits[:, :-1][counts].log_softmax(-1)
    loss = (goal.exp() * (goal - given)).sum(1).mean()
    loss.backward()
    # Blocks that are skipped are wrapped.
    plain = {name.replace(".layer.", "."): weight for name, weight in weights.items()}
    found = {}
    for name in factors:
        weight = name.removesuffix(LORA_A).removesuffix(LORA_B)
        grad = plain[weight].grad
        if name.endswith(LORA_A):
            found[name] = factors[weight + LORA_B].T @ grad
        else:
            found[name] = grad @ factors[weight + LORA_A].T
    return float(loss.detach()), found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2"])
def test_the_gradient_is_that_of_two_models(models: Models, name: str, checkpointing: bool) -> None:
    """Gemma 2 caps its logits; parts of a step add up to the whole."""
    path, removed = models(name), (2, 3)
    twin, text = twin_of(path, removed, checkpointing=checkpointing), passages(3)
    total = predicted(text)
    loss = sum(float(learn(twin, part, total)) for part in (text[:2], text[2:]))
    factors = {name: factor.detach().clone() for name, factor in twin.factors.items()}
    expected, gradients = expected_gradients(path, removed, factors, text)
    assert loss == pytest.approx(expected, rel=1e-4)
    for name, factor in twin.factors.items():
        assert factor.grad is not None, name
        scale = gradients[name].abs().max()
        assert (factor.grad - gradients[name]).abs().max() < 1e-3 * scale + 1e-7, name


def test_judgements_are_those_of_two_models(models: Models) -> None:
    path, text = models("llama"), passages(3)
    twin = twin_of(path)
    found = judgement(judge(twin, text, goal_of(twin, text)).tolist())
    factors = {name: factor.detach().clone() for name, factor in twin.factors.items()}
    teacher, student = oracle.load(path), merged_by_peft(path, REMOVED, factors)
    expected = expected_gradients(path, REMOVED, factors, text)[0]
    assert found.kl == pytest.approx(expected, rel=1e-4)
    ids = torch.tensor([list(passage.tokens) for passage in text])
    counts = torch.tensor([list(p.counts) for p in text]).bool()[:, 1:]
    answers = [model(ids, use_cache=False).logits[:, :-1][counts] for model in (teacher, student)]
    dense, pruned = (
        float(torch.nn.functional.cross_entropy(answer, ids[:, 1:][counts]).detach())
        for answer in answers
    )
    assert (found.dense_loss, found.loss) == pytest.approx((dense, pruned), rel=1e-4)
    same = (answers[0].argmax(-1) == answers[1].argmax(-1)).float().mean()
    assert found.agreement == pytest.approx(float(same))


def test_a_twin_leaves_the_model_as_it_was(models: Models) -> None:
    twin = twin_of(models("llama"))
    ids = torch.tensor(random_windows(1, 24))
    before = oracle.load(models("llama"))(ids, use_cache=False).logits
    learn(twin, passages(2), 40)
    with twin.teacher():
        assert torch.allclose(twin.model(ids, use_cache=False).logits, before, atol=1e-5)
    twin.close()
    assert torch.equal(twin.model(ids, use_cache=False).logits, before)
    assert not [n for n, _ in twin.model.named_parameters() if "lora" in n]


def test_a_healed_model_is_peft_merged_everywhere(models: Models, tmp_path: Path) -> None:
    """In Transformers with the blocks deleted, in the export, and in the golden answers."""
    path, output, told = models("llama"), tmp_path / "h.json", Told()
    before = (path / "model.safetensors").read_bytes()
    manifest = healed(path, REMOVED, output, progress=told)
    assert read_manifest(output) == manifest
    assert manifest.repair is not None
    trained = manifest.repair.training
    assert trained is not None
    best = min(told.judgements, key=lambda entry: entry.kl)
    assert best.kl < 0.9 * told.judgements[0].kl
    assert trained.agreement["healed"] == pytest.approx(best.agreement, abs=1e-4)
    assert trained.tokens == told.steps * 4 * 32 == 1536
    ids = torch.tensor([random_windows(1, 24)[0]])
    expected = oracle_of(path, REMOVED, output)(ids, use_cache=False).logits
    plain = oracle.pruned(path, REMOVED)(ids, use_cache=False).logits
    assert (expected - plain).abs().max() > 0.05
    model: Any = load_model(open_checkpoint(str(path)), "float32")
    with blocks_deleted(model, REMOVED, read_sidecar(manifest.pruning())):
        assert (model(ids, use_cache=False).logits - expected).abs().max() < 1e-5
    export(path, manifest, tmp_path / "out")
    assert (
        oracle.load(tmp_path / "out")(ids, use_cache=False).logits - expected
    ).abs().max() < 1e-5
    assert manifest.golden is not None
    golden = oracle.prompt_logprobs(oracle_of(path, REMOVED, output), list(manifest.golden.tokens))
    assert list(manifest.golden.logprobs) == pytest.approx(golden, abs=2e-4)
    assert (path / "model.safetensors").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        *("h.json", "h.json.repair.safetensors", "out"),
    ]


def test_only_a_number_of_blocks_that_was_healed_is_served(models: Models, tmp_path: Path) -> None:
    path, output = models("llama"), tmp_path / "h.json"
    manifest = healed(path, REMOVED, output, also=(1,), tokens=300)
    assert [repair.blocks for repair in manifest.repairs] == [1, 3]
    with pytest.raises(SlebError, match=r"repaired for 1, 3 blocks, .* heal with also=2"):
        manifest.prefix(2)
    first = read_manifest(output).prefix(1)
    assert first.repair is not None
    ids = torch.tensor([random_windows(1, 24)[0]])
    factors = load_file(sidecar_path(output, 1))
    expected = merged_by_peft(path, REMOVED[:1], factors)(ids, use_cache=False).logits
    model: Any = load_model(open_checkpoint(str(path)), "float32")
    with blocks_deleted(model, REMOVED[:1], read_sidecar(first.pruning())):
        assert (model(ids, use_cache=False).logits - expected).abs().max() < 1e-5


def test_a_healed_model_is_healed_further(models: Models, tmp_path: Path) -> None:
    """It begins where the first healing ended, and learns what that had no time for."""
    path, output, told = models("llama"), tmp_path / "h.json", Told()
    first = healed(path, REMOVED, output, tokens=512)
    config = HealConfig(**{**SMALL, "further": True, "rank": 7, "learning_rate": 0.01})
    with pytest.raises(SlebError, match="3 removals of this manifest are not healed yet"):
        heal(path, removing(path, REMOVED), config, tmp_path / "m.json")
    with pytest.raises(SlebError, match="is the input of `further`"):
        heal(path, first, config, output)
    manifest = heal(path, first, config, tmp_path / "more.json", progress=told)
    assert first.repair is not None
    assert manifest.repair is not None
    after = manifest.repair.training
    assert after is not None
    assert (after.tokens, after.rank) == (512 + 1536, 4)
    plain, start = told.judgements[:2]
    assert after.perplexity["pruned"] == pytest.approx(math.exp(plain.loss), rel=1e-4)
    assert min(entry.kl for entry in told.judgements) < 0.95 * start.kl
    assert start.kl < 0.95 * plain.kl
    # The first model is the one that was begun with.
    assert kl_with(path, load_file(sidecar_path(output))) == pytest.approx(start.kl, rel=1e-4)


def kl_with(path: Path, factors: dict[str, torch.Tensor]) -> float:
    """The divergence on held-out text with these updates."""
    twin = twin_of(path, rank=4)
    tokenizer = load_tokenizer(open_checkpoint(str(path)))
    text = make_mixture({"python-docs": 1.0}, tokenizer, length=32, most=48, held_out=4).held_out
    twin.load(factors)
    return judgement(judge(twin, text, goal_of(twin, text)).tolist()).kl


def test_more_removals_begin_with_the_updates_of_fewer(models: Models, tmp_path: Path) -> None:
    path, output, told = models("llama"), tmp_path / "h.json", Told()
    manifest = healed(path, REMOVED, output, also=(2,), progress=told)
    few = load_file(sidecar_path(output, 2))
    gone = tuple(f"model.layers.{block}." for block in REMOVED)
    kept = {name: factor for name, factor in few.items() if not name.startswith(gone)}
    assert len(kept) < len(few)
    start = kl_with(path, kept)
    at = next(i for i, e in enumerate(told.judgements) if e.kl == pytest.approx(start, rel=1e-4))
    # Just before, the model without any updates was judged.
    assert start < 0.95 * told.judgements[at - 1].kl
    tokens = [repair.training.tokens for repair in manifest.repairs if repair.training is not None]
    assert tokens == [1536, 2 * 1536]


def test_two_processes_train_as_one_does(models: Models, tmp_path: Path) -> None:
    """With the same batch a step: five sequences, three of one process and two of the other."""
    manifest = tmp_path / "m.json"
    removing(models("llama"), REMOVED).write(manifest)

    def command(count: str) -> list[str]:
        output = str(tmp_path / f"{count}.json")
        files = ["heal", str(models("llama")), "-m", str(manifest), "-o", output]
        return [*files, *COMMAND, "--batch-size", "5"]

    ((told,), (quiet,)) = run_in_two([command("two")], tmp_path / "two", OMP_NUM_THREADS="1")
    with one_thread():
        assert main(command("one")) == 0
    assert (told.code, quiet.code) == (0, 0), told.error
    assert "wrote " in told.out
    assert not quiet.out
    one, two = (load_file(sidecar_path(tmp_path / f"{count}.json")) for count in ("one", "two"))
    assert one.keys() == two.keys()
    for name, factor in one.items():
        assert (factor - two[name]).abs().max() < 0.02 * factor.abs().max(), name
    trainings = [
        read_manifest(tmp_path / f"{count}.json").repairs[0].training for count in ("one", "two")
    ]
    assert trainings[0] is not None
    assert trainings[1] is not None
    for which, perplexity in trainings[0].perplexity.items():
        assert trainings[1].perplexity[which] == pytest.approx(perplexity, rel=1e-3)


def test_memory_is_little_more_than_that_of_inference(tmp_path: Path) -> None:
    """Beside adapters and optimiser: layers are run again, logits made a few tokens at a time."""
    path = tmp_path / "wide"
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 8192}
    save_model("llama", path, max_position_embeddings=512, **sizes)
    twin, text = twin_of(path, checkpointing=True), passages(4, 512)
    ids = torch.tensor([list(passage.tokens) for passage in text])
    with torch.no_grad():
        inference = peak_bytes(lambda: twin.model(ids, use_cache=False).logits)
    healing = peak_bytes(lambda: learn(twin, text, predicted(text)))
    weights = sum(p.nbytes for n, p in twin.model.named_parameters() if "lora" not in n)
    assert weights + healing < 1.35 * (weights + inference)


def step_twice(path: Path, output: Path) -> None:
    """For a fork: how far two steps in bfloat16 raise the process's peak, over their tensors'."""
    checkpoint = open_checkpoint(str(path))
    model = load_model(checkpoint, "bfloat16").requires_grad_(False)
    kept = [block for block in range(checkpoint.num_blocks) if block not in REMOVED]
    names = adaptable(model, checkpoint, kept, None)
    twin = Twin(model, REMOVED, names, rank=4, seed=3, checkpointing=True)
    text = passages(4, 512)
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
    before = status("VmRSS")
    for _ in range(2):
        learn(twin, text, predicted(text))
    growth = status("VmHWM") - before
    output.write_text(str(growth / peak_bytes(lambda: learn(twin, text, predicted(text)))))


def test_the_heap_holds_little_beside_the_tensors(tmp_path: Path) -> None:
    """Fragmented, it held 4.6 times as much as they need; a part is the libraries' own.

    A CPU that emulates bfloat16 holds more copies of its own than that, and takes minutes.
    """
    if not has_fast("bfloat16"):
        pytest.skip("this CPU has no bfloat16 products")
    path, log, output = tmp_path / "deep", tmp_path / "log", tmp_path / "share"
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 8192}
    save_model("llama", path, max_position_embeddings=512, num_hidden_layers=16, **sizes)
    code = run_fork(step_twice, log, path, output, OMP_NUM_THREADS="1")
    assert code == 0, log.read_text()
    assert float(output.read_text()) < 3.8
