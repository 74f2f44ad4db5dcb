"""The loss of a causal LM with blocks skipped: the layer sweep.

All candidates of a greedy step share the layers before their block. The sweep runs each layer once
on a growing list of states: the base's, and one for each candidate skipped so far. This halves the
block work of one pass per candidate. Two techniques save more without changing any result:

- *Snapshots.* Removing a block does not change the layers before it. The input states of likely
next blocks are kept, and the next step begins at the removed block. - *Bounds.* The loss over part
of the vocabulary is at most the loss over all of it. Every candidate is scored on the most likely
twelfth of the head's rows, and only the candidate with the lowest bound is scored further, until
the lowest loss is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sleb_serve.errors import SlebError
from sleb_serve.models.layerwise import CausalLM, same
from sleb_serve.selection.lm_head import LOGITS_BYTES, Dense, Tally, Vocabulary
from sleb_serve.selection.memory import Needs, Plan, chunk_for, make_plan, peak_bytes
from sleb_serve.selection.racing import Drop, lead, rivals
from sleb_serve.selection.search import Scores
from sleb_serve.selection.states import (
    BASE,
    SequenceStates,
    Work,
    from_snapshot,
    key_of,
    snapshot_positions,
)

_ROUNDING = 1e-6
"""Tolerance of a bound for the summation order of logits."""


class LayerSweep:
    """Losses of a causal LM with blocks skipped, over sequences of tokens.

    Args:
        model: the layer-by-layer model.
        sequences: this process's sequences of token ids, all of the same length.
        budget: bytes; see `sleb_serve.selection.memory`. None for no limit, with one state per
            chunk.
        weights: bytes of the resident weights, part of the budget.
        streamed: whether the layers' weights are read from disk.
        gather: collects the per-sequence values of all processes from those of this one.
        objective: ``nll``, the loss on the text; or ``kl``, the Kullback-Leibler divergence of the
            dense model's predictions from the pruned one's, in nats per predicted token.
    """

    def __init__(
        self,
        model: CausalLM,
        sequences: Sequence[Sequence[int]],
        *,
        budget: int | None = None,
        weights: int = 0,
        streamed: bool = False,
        gather: Callable[[list[Any]], list[Any]] = lambda values: values,
        objective: str = "nll",
    ) -> None:
        self.model = model
        self._against_dense = objective == "kl"
        self._gather = gather
        if max(max(sequence) for sequence in sequences) >= model.vocabulary:
            raise SlebError(
                "the tokenizer makes token ids beyond the model's vocabulary; the tokenizer files "
                "are not this model's"
            )
        state, calls = model.begin(sequences[0])
        self._sequences = [
            SequenceStates(torch.tensor(sequence, device=model.device), calls)
            for sequence in sequences
        ]
        for sequence in self._sequences[1:]:
            own = model.begin(sequence.tokens.tolist())[1]
            if not same(own, calls):
                sequence.calls = own
        self.plan = self._make_plan(state, budget, weights, streamed)
        self._losses: dict[int, float] = {}
        self._keeps_bases = False
        # Processes may differ by one sequence; all take part in all rounds.
        most = max(self._gather([len(self._sequences)]))
        self._rounds = -(-most // self.plan.sequences)

    def score(
        self,
        removed: Sequence[int],
        candidates: Sequence[int],
        *,
        on_layer: Callable[[], None] = lambda: None,
        drop: Drop = lambda segments, share: frozenset(),
        slack: float = 0.0,
        least: int = 1,
    ) -> Scores:
        """Mean nats per predicted token with `removed` and each of `candidates` in turn skipped.

        The official score is the sum over sequences of the mean cross-entropy of the L-1 predicted
        tokens, times L (sleb.py of the official code); this is that sum over the number of tokens.

        Args:
            removed: blocks that are already removed.
            candidates: blocks to try, ascending, none in `removed`.
            on_layer: called for each sequence and remaining block, `layer_count` times.
            drop: returns the candidates to drop after each group of sequences.
            slack: losses within this of the lowest are also exact.
            least: how many of the lowest losses are always exact.

        Returns:
            One loss per candidate. The `least` smallest are exact. Others are lower bounds; dropped
            candidates get an extrapolated estimate.
        """
        self._meet_dense(removed)
        base = not self._sequences[0].parts
        known, active = self._losses, list(candidates)
        segments: dict[int, list[float]] = {block: [] for block in candidates}
        for number in range(self._rounds):
            group = self._sequences[number * self.plan.sequences :][: self.plan.sequences]
            keep, self._keeps_bases = snapshot_positions(
                self._sequences, self.plan, len(self.model.layers), removed, active, known
            )
            self._sweep(group, removed, active, base, keep, on_layer)
            for block in active:
                own = [sequence.tallies[block].segments() for sequence in group]
                segments[block] += [loss for part in self._gather(own) for loss in part]
            share = (number + 1) / self._rounds
            gone = drop({block: segments[block] for block in active}, share)
            active = [block for block in active if block not in gone]
            known = self._drop_finals(active)
        base_loss = self._mean(BASE) if base else None
        bounds, exact = self._settle(removed, active, slack, least)
        best = min((c for c in active if exact[c]), key=lambda c: bounds[c], default=BASE)
        close = () if best == BASE else rivals({c: segments[c] for c in active}, best)
        for block in set(candidates).difference(active):
            ahead = lead(segments[best], segments[block])
            bounds[block], exact[block] = bounds[best] + max(ahead, _ROUNDING), False
        self._losses |= bounds
        for sequence in self._sequences:
            sequence.tallies = {}
        return Scores(
            tuple(bounds[c] for c in candidates),
            tuple(exact[c] for c in candidates),
            base_loss,
            close,
        )

    def _settle(
        self, removed: Sequence[int], active: Sequence[int], slack: float, least: int
    ) -> tuple[dict[int, float], dict[int, bool]]:
        """Score on more of the vocabulary until the `least` smallest losses are exact.

        Returns:
            Each candidate's loss or lower bound, and whether it is exact.
        """
        bounds = {block: self._mean(block) for block in active}
        exact = dict.fromkeys(active, self._parts == 1)
        limit = math.inf
        while open_ := [c for c in active if not exact[c] and bounds[c] <= limit + slack]:
            # Always extend the lowest bound: candidates above the final lowest are never fully
            # scored.
            block = min(open_, key=lambda c: bounds[c])
            exact[block] = self._refine(removed, block)
            bounds[block] = self._mean(block)
            whole = sorted(bounds[c] for c in active if exact[c])
            if len(whole) >= least:
                limit = whole[least - 1]
        return bounds, exact

    def loss(self, removed: Sequence[int]) -> float:
        """Mean nats per predicted token with `removed` skipped."""
        self._meet_dense(removed)
        for sequence in self._sequences:
            self._sweep([sequence], removed, (), True, frozenset(), lambda: None)
        result = self._mean(BASE)
        for sequence in self._sequences:
            sequence.tallies = {}
        return result

    def layer_count(self, removed: Sequence[int]) -> int:
        """Return how often `score` calls `on_layer`."""
        return len(self._sequences) * (len(self.model.layers) - len(removed))

    def _meet_dense(self, removed: Sequence[int]) -> None:
        """Run the dense model first if losses are relative to it."""
        if self._against_dense and removed and self._sequences[0].dense is None:
            self.loss(())

    @property
    def _parts(self) -> int:
        return len(self._sequences[0].parts)

    def _mean(self, fork: int) -> float:
        """Return the mean over all sequences of all processes, slightly reduced for bounds."""
        own = [sequence.tallies[fork] for sequence in self._sequences]
        values = self._gather([tally.mean for tally in own])
        mean = math.fsum(values) / len(values)
        return mean if own[0].parts == self._parts else mean - _ROUNDING * abs(mean)

    def _sweep(
        self,
        group: Sequence[SequenceStates],
        removed: Sequence[int],
        candidates: Sequence[int],
        base: bool,
        keep: frozenset[int],
        on_layer: Callable[[], None],
    ) -> None:
        """Run each candidate's state, and the base's if wanted, through the last layer."""
        gone, forks = frozenset(removed), frozenset(candidates)
        last = max(candidates, default=BASE)
        works = [self._start(sequence, gone, forks) for sequence in group]
        for index in range(len(self.model.layers)):
            if index in gone:
                continue
            for sequence, work in zip(group, works, strict=True):
                self._enter(sequence, work, index, gone, forks, keep)
                if index >= last and not base:
                    work.states.pop(BASE, None)  # it was only needed for forks
            if any(work.states.keys() - {index} for work in works):
                with self.model.loaded(index) as layer:
                    for sequence, work in zip(group, works, strict=True):
                        moving = [fork for fork in work.states if fork != index]
                        for at in range(0, len(moving), self.plan.chunk):
                            part = moving[at : at + self.plan.chunk]
                            states = [work.states[fork] for fork in part]
                            moved = self.model.run(layer, states, sequence.calls[index])
                            work.states.update(zip(part, moved, strict=True))
            for _ in group:
                on_layer()
        for sequence, work in zip(group, works, strict=True):
            # If no layer follows a removed block, its input is the final state.
            self._finish(sequence, work.states or work.there)

    def _enter(
        self,
        sequence: SequenceStates,
        work: Work,
        index: int,
        gone: frozenset[int],
        forks: frozenset[int],
        keep: frozenset[int],
    ) -> None:
        """Before a layer: restore and take snapshots, and fork its candidate."""
        if index == work.first:
            work.states |= work.there
        key = key_of(index, gone)
        if index < work.first:
            if index in work.late:
                work.states[index] = sequence.bases[key]
            return
        if BASE in work.states:
            if index in keep:
                sequence.snapshots[key] = dict(work.states)
            if self._keeps_bases:
                sequence.bases[key] = work.states[BASE]
            if index in forks:
                work.states[index] = work.states[BASE]

    def _finish(self, sequence: SequenceStates, states: dict[int, Tensor]) -> None:
        """Score final states on the first part of the vocabulary."""
        while states:
            # The base comes first, because it determines the likely rows of the head.
            fork = min(states)
            normed = self.model.normed(states.pop(fork))[:-1]
            if fork == BASE and not sequence.parts:
                # A bound of the divergence would also need the whole vocabulary.
                everything = [torch.arange(self.model.vocabulary, device=normed.device)]
                sequence.parts = (
                    everything
                    if self._against_dense
                    else self._head.parts(normed, sequence.targets)
                )
                sequence.dense = self._head.dense(normed) if self._against_dense else None
            tally = Tally(normed)
            sequence.tallies[fork] = tally
            self._add(sequence, tally)
            while fork == BASE and tally.parts < len(sequence.parts):
                self._add(sequence, tally)

    def _add(self, sequence: SequenceStates, tally: Tally) -> None:
        self._head.add(tally, sequence.parts, sequence.targets, sequence.dense)

    def _start(self, sequence: SequenceStates, gone: frozenset[int], forks: frozenset[int]) -> Work:
        found = from_snapshot(sequence, gone, forks, len(self.model.layers))
        return found or Work(0, {BASE: self.model.begin(sequence.tokens.tolist())[0]}, frozenset())

    def _drop_finals(self, candidates: Sequence[int]) -> dict[int, float]:
        """Keep the states of only the best candidates; return the bounds so far."""
        done = [sequence for sequence in self._sequences if sequence.tallies]
        sums = {c: math.fsum(sequence.tallies[c].mean for sequence in done) for c in candidates}
        for block in sorted(candidates, key=lambda c: sums[c])[self.plan.finals :]:
            for sequence in done:
                sequence.tallies[block].normed = None
        for sequence in done:
            if BASE in sequence.tallies:
                sequence.tallies[BASE].normed = None
        return sums

    def _refine(self, removed: Sequence[int], block: int) -> bool:
        """Score a candidate on the next part of the vocabulary; return whether it was the last."""
        for sequence in self._sequences:
            tally = sequence.tallies[block]
            if tally.normed is None:
                before = sequence.tallies
                sequence.tallies = {}
                self._sweep([sequence], removed, (block,), False, frozenset(), lambda: None)
                tally.normed = sequence.tallies[block].normed
                sequence.tallies = before
            self._add(sequence, tally)
        return self._sequences[0].tallies[block].parts == self._parts

    def _make_plan(self, state: Tensor, budget: int | None, weights: int, streamed: bool) -> Plan:
        """Measure the work on the first sequence's state, and plan the budget."""
        sequence = self._sequences[0]
        layers = len(self.model.layers)
        self._head = Vocabulary(self.model)
        if budget is None:
            return Plan(1, 1, len(self._sequences) * layers * layers, layers)
        self._head = Vocabulary(self.model, min(LOGITS_BYTES, budget // 32))

        def one_layer() -> None:
            with self.model.loaded(0) as layer:
                self.model.run(layer, [state], sequence.calls[0])

        def one_head() -> None:
            normed = self.model.normed(state)[:-1]
            rows = torch.arange(self._head.rows_at_once(len(normed)), device=normed.device)
            dense = Dense(normed, normed.float().sum(1)) if self._against_dense else None
            self._head.add(Tally(normed), [rows], sequence.targets, dense)

        needs = Needs(weights, state.nbytes, peak_bytes(one_layer), peak_bytes(one_head))
        return make_plan(
            budget,
            needs,
            sequences=len(self._sequences),
            forks=layers,
            best_chunk=chunk_for(self.model.device.type, state.shape[1]),
            streamed=streamed,
            extra=len(self._sequences) if self._against_dense else 0,
        )
