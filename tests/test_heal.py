"""Healing: its gradient, its result and its ends, against two models and PEFT's own merge."""

from __future__ import annotations

import json
import os
import signal
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import oracle
from commands import one_thread, run_in_one, run_on_full_disk
from conftest import Models, save_model
from forking import run_fork
from healing import healed, merged_by_peft, oracle_of, removing
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.cli.main import main
from sleb_serve.convert.export import export
from sleb_serve.data.training import Passage
from sleb_serve.errors import SlebError
from sleb_serve.healing import training
from sleb_serve.healing.config import Judgement, Progress
from sleb_serve.healing.distillation import judge, judgement, learn, predicted
from sleb_serve.healing.twin import Twin, adaptable
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.manifest.repair_file import LORA_A, LORA_B, read_sidecar, sidecar_path
from sleb_serve.models.loading import load_model
from sleb_serve.models.pruned import blocks_deleted
from sleb_serve.selection.memory import peak_bytes
from sweeps import random_windows

REMOVED = (2, 3, 6)
COMMAND = (
    *("--text", "python-docs", "--tokens", "1K", "--rank", "4", "--sequence-length", "32"),
    *("--batch-size", "4", "--held-out", "4"),
)


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
    return float(loss), found


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
    found = judgement(judge(twin, text).tolist())
    factors = {name: factor.detach().clone() for name, factor in twin.factors.items()}
    teacher, student = oracle.load(path), merged_by_peft(path, REMOVED, factors)
    expected = expected_gradients(path, REMOVED, factors, text)[0]
    assert found.kl == pytest.approx(expected, rel=1e-4)
    ids = torch.tensor([list(passage.tokens) for passage in text])
    counts = torch.tensor([list(p.counts) for p in text]).bool()[:, 1:]
    answers = [model(ids, use_cache=False).logits[:, :-1][counts] for model in (teacher, student)]
    dense, pruned = (
        float(torch.nn.functional.cross_entropy(answer, ids[:, 1:][counts])) for answer in answers
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


class Told(Progress):
    """Remembers the judgements."""

    def __init__(self) -> None:
        self.judgements: list[Judgement] = []
        self.steps = 0

    def stepped(self, done: float, loss: float, tokens: int) -> None:
        self.steps += 1

    def judged(self, done: float, judgement: Judgement) -> None:
        self.judgements.append(judgement)


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


class Killed(Told):
    """Dies after some steps, as by `kill -9`."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.last = steps

    def stepped(self, done: float, loss: float, tokens: int) -> None:
        super().stepped(done, loss, tokens)
        if self.steps == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def heal_and_die(path: Path, output: Path, steps: int, also: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    healed(path, REMOVED, output, resume=True, progress=Killed(steps), also=also)


def test_killed_and_resumed_the_result_is_the_same_bytes(models: Models, tmp_path: Path) -> None:
    """Killed twice: in the first model and in the second one."""
    path, also = models("llama"), (1,)
    torch.set_num_threads(1)
    healed(path, REMOVED, tmp_path / "whole.json", also=also)
    output = tmp_path / "h.json"
    for steps in (5, 15):
        code = run_fork(heal_and_die, tmp_path / "log", path, output, steps, also)
        assert code == -signal.SIGKILL, (tmp_path / "log").read_text()
        assert not output.exists()
    told = Told()
    healed(path, REMOVED, output, also=also, resume=True, progress=told)
    assert told.steps < 12
    for blocks in (None, 1):
        whole, resumed = (sidecar_path(tmp_path / f, blocks) for f in ("whole.json", "h.json"))
        assert whole.read_bytes() == resumed.read_bytes()
    assert not list(tmp_path.glob("*.state"))


def test_it_ends_early_where_nothing_gets_better(models: Models, tmp_path: Path) -> None:
    told = Told()
    manifest = healed(
        *(models("llama"), REMOVED, tmp_path / "h.json"),
        learning_rate=0.9,
        patience=2,
        tokens=30_000,
        progress=told,
    )
    assert told.steps < 200
    best = min(range(len(told.judgements)), key=lambda i: told.judgements[i].kl)
    assert len(told.judgements) - best - 1 == 2
    assert manifest.repair is not None
    assert manifest.repair.training is not None
    assert manifest.repair.training.agreement["healed"] == pytest.approx(
        told.judgements[best].agreement, abs=1e-4
    )


@pytest.fixture
def refusal(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    manifest = tmp_path / "m.json"
    removing(models("llama"), REMOVED).write(manifest)

    def refuse(*more: str, model: Path | None = None) -> str:
        output = tmp_path / "h.json"
        command = ["heal", str(model or models("llama")), "-m", str(manifest), "-o", str(output)]
        assert main([*command, *COMMAND, *more]) == 2
        # Behind progress, the last line.
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("sleb-serve: error: ")
        assert {file.name for file in tmp_path.iterdir()} <= {
            "m.json",
            "h.json.heal-3.state",
            "t.txt",
        }
        return line

    return refuse


def test_what_cannot_be_healed_is_refused_in_one_line(
    refusal: Callable[..., str], tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.txt").write_text("Too short.")
    text = f"{tmp_path / 't.txt'}:2"
    assert "less" in refusal("--text", text) or "gives 0 sequences" in refusal("--text", text)
    assert "the blocks have down_proj, gate_proj" in refusal("--projections", "q_proj,nothing")
    assert "--sequence-length 4096 is more than the model's context" in refusal(
        "--sequence-length", "4096"
    )
    for option, value in (
        *(("--rank", "0"), ("--minutes", "nan"), ("--learning-rate", "2"), ("--tokens", "2X")),
        *(("--text", "a:0"), ("--text", "a,a"), ("--held-out", "0"), ("--also", "4")),
    ):
        assert f"{option}" in refusal(option, value) or "K must be between" in refusal(
            option, value
        )
    other = models("qwen2")
    assert "the manifest is for another model" in refusal(model=other)
    monkeypatch.setattr(training, "learn", lambda *_: torch.tensor(float("nan")))
    line = refusal()
    assert "the loss is nan at step 1" in line
    assert "--learning-rate" in line


def test_a_quantised_model_is_refused(models: Models, tmp_path: Path) -> None:
    path = tmp_path / "q"
    save_model("llama", path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SlebError, match="is quantised, and a change of its weights"):
        healed(path, REMOVED, tmp_path / "h.json")


def test_a_pooling_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p"
    save_model("llama", path)
    config = json.loads((path / "config.json").read_text())
    config["architectures"] = ["LlamaModel"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SlebError, match="LlamaModel predicts no tokens"):
        healed(path, REMOVED, tmp_path / "h.json")


def test_a_state_of_another_healing_is_refused(models: Models, tmp_path: Path) -> None:
    path, output = models("llama"), tmp_path / "h.json"
    code = run_fork(heal_and_die, tmp_path / "log", path, output, 5, ())
    assert code == -signal.SIGKILL, (tmp_path / "log").read_text()
    state = tmp_path / "h.json.heal-3.state"
    for changes in ({"rank": 8}, {"seed": 1}, {"tokens": 1537}, {"texts": {"python-docs": 2.0}}):
        with pytest.raises(SlebError, match="of a healing with another"):
            healed(path, REMOVED, output, resume=True, **changes)
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(SlebError, match="cannot go on from"):
        healed(path, REMOVED, output, resume=True)


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    models: Models, tmp_path: Path
) -> None:
    manifest, log = tmp_path / "m.json", tmp_path.parent / f"{tmp_path.name}.log"
    removing(models("llama"), REMOVED).write(manifest)
    command = ["heal", str(models("llama")), "-m", str(manifest), "-o", str(tmp_path / "h.json")]
    assert run_fork(run_on_full_disk, log, [*command, *COMMAND, "--rank", "64"], 60_000) == 2, (
        log.read_text()
    )
    line = log.read_text().strip().splitlines()[-1]
    assert line.startswith("sleb-serve: error: cannot write ")
    assert [file.name for file in tmp_path.iterdir()] == ["m.json"]


def test_two_processes_train_as_one_does(models: Models, tmp_path: Path) -> None:
    """With the same batch a step: five sequences, three of one process and two of the other."""
    manifest = tmp_path / "m.json"
    removing(models("llama"), REMOVED).write(manifest)

    def command(count: str) -> list[str]:
        output = str(tmp_path / f"{count}.json")
        files = ["heal", str(models("llama")), "-m", str(manifest), "-o", output]
        return [*files, *COMMAND, "--batch-size", "5"]

    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2"]
    ((told,), (quiet,)) = run_in_one(
        [command("two")], tmp_path / "log", launcher, OMP_NUM_THREADS="1"
    )
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
