"""How a healing ends: killed and resumed, early, refused, on a full disk."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from commands import run_on_full_disk
from conftest import Models, save_model
from forking import run_fork
from healing import COMMAND, REMOVED, SMALL, Told, healed, removing
from sleb_serve.cli.main import main
from sleb_serve.errors import SlebError
from sleb_serve.healing import training
from sleb_serve.healing.config import HealConfig
from sleb_serve.healing.pipeline import heal
from sleb_serve.manifest.repair_file import sidecar_path


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


def test_a_healing_that_goes_on_may_lose_at_first(models: Models, tmp_path: Path) -> None:
    """It ends early by its own validations, not by those of the healing it continues."""
    path, told = models("llama"), Told()
    first = healed(path, REMOVED, tmp_path / "h.json")
    more = {"further": True, "learning_rate": 0.9, "patience": 2, "tokens": 30_000}
    config = HealConfig(**{**SMALL, **more})
    manifest = heal(path, first, config, tmp_path / "more.json", progress=told)
    start, *trained = (entry.kl for entry in told.judgements[1:])
    assert min(trained) > start
    assert len(trained) - 1 - trained.index(min(trained)) == 2
    # What it began with stays the best.
    assert first.repair is not None
    assert manifest.repair is not None
    assert manifest.repair.sha256 == first.repair.sha256


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
    with pytest.raises(SlebError, match="LlamaModel does not predict tokens"):
        healed(path, REMOVED, tmp_path / "h.json")


def test_a_state_of_another_healing_is_refused(models: Models, tmp_path: Path) -> None:
    path, output = models("llama"), tmp_path / "h.json"
    code = run_fork(heal_and_die, tmp_path / "log", path, output, 5, ())
    assert code == -signal.SIGKILL, (tmp_path / "log").read_text()
    state = tmp_path / "h.json.heal-3.state"
    for changes in ({"rank": 8}, {"seed": 1}, {"tokens": 1537}, {"texts": {"python-docs": 2.0}}):
        with pytest.raises(SlebError, match="a healing run with another"):
            healed(path, REMOVED, output, resume=True, **changes)
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(SlebError, match="cannot resume from"):
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
