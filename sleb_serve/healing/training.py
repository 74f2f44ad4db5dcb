"""The training loop: Adam steps until the budget is used, with validation on held-out text.

The state is saved at every validation, so that a killed run resumes from there and produces the
same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sleb_serve.data.training import Mixture, Passage
from sleb_serve.errors import SlebError, first_line
from sleb_serve.healing.config import HealConfig, Judgement, Progress
from sleb_serve.healing.distillation import goal_of, judge, judgement, learn, predicted
from sleb_serve.healing.twin import Twin
from sleb_serve.utils.atomic_io import whole_file
from sleb_serve.utils.distributed import Ranks

_JUDGEMENTS = 20
"""Number of validations per run; each saves the state."""
_WARM_UP = 0.05
"""Share of the budget for the learning rate's warm-up."""
_CLIP = 1.0
"""Maximum norm of the gradient."""


@dataclass
class State:
    """State of a training.

    Attributes:
        steps: finished steps.
        tokens: trained tokens.
        seconds: elapsed time.
        judgements: validations of the student, the first before any step.
        best: the factors with the lowest divergence on held-out text.
        ended: whether the training is complete.
        early: whether it ended because it stopped improving.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    judgements: list[Judgement] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    ended: bool = False
    early: bool = False

    @property
    def best_judgement(self) -> Judgement:
        """Return the validation with the lowest divergence."""
        return min(self.judgements, key=lambda entry: entry.kl)

    def done(self, config: HealConfig) -> float:
        """Return the used share of the budget; at least 1 at its end."""
        shares = [0.0]
        if config.budget is not None:
            shares.append(self.tokens / config.budget)
        if config.minutes is not None:
            shares.append(self.seconds / (60 * config.minutes))
        return max(shares)


class Trainer:
    """Trains one student.

    Args:
        twin: teacher and student.
        mixture: the text.
        config: the training options.
        ranks: the processes that share each step.
        path: file for the state, or None.
        fingerprint: fingerprint of all inputs; a state with another one is refused.
        progress: receives progress events.
        start: initial factors; empty for no change.
    """

    def __init__(
        self,
        twin: Twin,
        mixture: Mixture,
        config: HealConfig,
        ranks: Ranks,
        path: Path | None,
        fingerprint: str,
        progress: Progress,
        start: Mapping[str, Tensor],
    ) -> None:
        self._twin, self._mixture, self._config = twin, mixture, config
        self._start = start
        self._ranks, self._path, self._fingerprint = ranks, path, fingerprint
        self._progress = progress
        self._goals: list[Tensor] = []
        self._factors = list(twin.factors.values())
        self._adam = torch.optim.AdamW(self._factors, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
        self._state = State()

    def run(self, resume: bool) -> State:
        """Train until the budget is used or the model stops improving.

        Raises:
            SlebError: the loss is not a number, or the state cannot be read or written.
        """
        if resume and self._path is not None and self._path.exists():
            self._load(self._path)
        state, config = self._state, self._config
        if not state.judgements:
            self._judge(0.0)
            if self._start:
                self._twin.load(self._start)
                self._judge(0.0)
        passages = iter(self._mixture)
        for _ in islice(passages, state.steps * config.batch_size):
            pass
        begun = time.monotonic() - state.seconds
        while not state.ended:
            before = state.done(config)
            loss = self._step(list(islice(passages, config.batch_size)), before)
            state.steps += 1
            state.tokens += config.batch_size * len(self._mixture.held_out[0].tokens)
            # All processes use one clock, because they must end together.
            state.seconds = self._ranks.gather([time.monotonic() - begun])[0]
            done = state.done(config)
            self._progress.stepped(min(1.0, done), loss, state.tokens)
            state.ended = done >= 1
            if state.ended or int(done * _JUDGEMENTS) > int(before * _JUDGEMENTS):
                self._judge(min(1.0, done))
        return state

    def _step(self, passages: Sequence[Passage], done: float) -> float:
        """Make one Adam step on the gradient of all processes' passages."""
        total = predicted(passages)
        rate = self._config.learning_rate * min(1.0, (done + 1e-9) / _WARM_UP) * (1 - done)
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.zero_grad()
        own = self._ranks.share(passages)
        size = self._config.sequences_at_once
        parts = [
            learn(self._twin, own[start : start + size], total)
            for start in range(0, len(own), size)
        ]
        loss = torch.stack(parts).sum()
        if self._ranks.count > 1:
            from accelerate.utils import reduce

            loss = reduce(loss)
            for factor in self._factors:
                factor.grad = reduce(factor.grad)
        value = float(loss)
        if value != value or value in (float("inf"), float("-inf")):
            raise SlebError(
                f"the loss is {value} at step {self._state.steps + 1}: the training does not "
                f"converge; give a lower `learning_rate` (now {self._config.learning_rate:g})"
            )
        torch.nn.utils.clip_grad_norm_(self._factors, _CLIP)
        self._adam.step()
        return value

    def _judge(self, done: float) -> None:
        """Validate the student, keep it if it is the best yet, and save the state."""
        state, held_out = self._state, self._mixture.held_out
        size = self._config.sequences_at_once
        parts = [held_out[start : start + size] for start in range(0, len(held_out), size)]
        if not self._goals:
            self._goals = [goal_of(self._twin, part) for part in parts]
        sums = sum(
            judge(self._twin, part, goal) for part, goal in zip(parts, self._goals, strict=True)
        )
        assert isinstance(sums, Tensor)
        found = judgement(sums.tolist())
        state.judgements.append(found)
        if found is state.best_judgement:
            state.best = {
                name: factor.detach().to("cpu", copy=True)
                for name, factor in self._twin.factors.items()
            }
        # A healing that continues another one may lose at first, at the full learning rate.
        trained = [entry.kl for entry in state.judgements[2 if self._start else 0 :]]
        since = len(trained) - 1 - trained.index(min(trained)) if trained else 0
        if since >= self._config.patience and not state.ended:
            state.ended = state.early = True
        self._progress.judged(done, found)
        if self._path is not None and self._ranks.index == 0:
            self._save(self._path)

    def _save(self, path: Path) -> None:
        content = {
            **vars(self._state),
            "judgements": [asdict(entry) for entry in self._state.judgements],
            "factors": {name: factor.detach() for name, factor in self._twin.factors.items()},
            "adam": self._adam.state_dict(),
            "fingerprint": self._fingerprint,
        }
        with whole_file(path) as temporary:
            try:
                torch.save(content, temporary)
            except RuntimeError as error:
                # torch's error for a full disk.
                raise OSError(first_line(error)) from error

    def _load(self, path: Path) -> None:
        try:
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            fingerprint = content.pop("fingerprint")
            factors, adam = content.pop("factors"), content.pop("adam")
            content["judgements"] = [Judgement(**entry) for entry in content["judgements"]]
            state = State(**content)
            if fingerprint == self._fingerprint:
                self._take(state, factors, adam)
        except Exception as error:
            raise SlebError(
                f"cannot resume from {path}: {first_line(error)}; delete it to start over"
            ) from error
        if fingerprint != self._fingerprint:
            raise SlebError(
                f"{path} belongs to a healing run with another model, manifest, text or options; "
                "use the same ones, or delete it to start over"
            )

    def _take(self, state: State, factors: dict[str, Tensor], adam: dict[str, Any]) -> None:
        self._state = state
        self._twin.load(factors)
        self._adam.load_state_dict(adam)
