"""The scorer of a search, with its model loaded as memory and processes allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.checkpoint.decoder import count_of
from sleb_serve.cut.config import shared_sources
from sleb_serve.cut.layers import decoder_of
from sleb_serve.data.calibration import Sequences
from sleb_serve.errors import SlebError
from sleb_serve.models.layerwise import CausalLM
from sleb_serve.models.loading import EMULATED, has_fast, load_model
from sleb_serve.selection.layer_sweep import LayerSweep
from sleb_serve.selection.memory import USED_SHARE, BudgetError, default_budget, give_back_freed
from sleb_serve.selection.racing import FastSearch
from sleb_serve.selection.repair import Gap, fit
from sleb_serve.selection.search import Scores
from sleb_serve.selection.whole_model import EMBEDDING, WholeModel
from sleb_serve.utils.distributed import Ranks, processes_here
from sleb_serve.utils.sizes import format_size

FAST_ERROR = 0.05
"""Probability that any step of ``--search fast`` differs from the exact search."""

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Scorer:
    """Scores candidates by the exact sweep or a race.

    Args:
        checkpoint: the model.
        sequences: the calibration text, all processes' sequences.
        ranks: the processes that share the sequences.
        dtype: compute dtype; see `load_model`. With ``auto``, a 16-bit model runs in float32 on a
            CPU without native support for its dtype, if it fits.
        budget: bytes for this process; None for four fifths of the free memory.
        steps: number of steps of the search.
        fast: whether to race.
        objective: see `LayerSweep`.

    Raises:
        SlebError: the model cannot be loaded within the budget.

    Attributes:
        how: a one-line description.
        dtype: the compute dtype.
        sweep: the exact sweep.
        screen: the sweep in a cheaper dtype for races, or None.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        sequences: Sequences,
        ranks: Ranks,
        *,
        dtype: str,
        budget: int | None,
        steps: int,
        fast: bool,
        objective: str = "nll",
    ) -> None:
        own = ranks.share(sequences.tokens)
        length = len(own[0])
        budget = _own_budget(budget)
        dtype = _affordable(checkpoint, ranks, dtype, length, budget)
        resident, outside = _weights(checkpoint, dtype)
        computed = checkpoint.dtype if dtype == "auto" else dtype
        states = _states_bytes(checkpoint, length, computed)
        load = partial(_sweep, checkpoint, own, ranks, objective)
        self.screen: LayerSweep | WholeModel | None = None
        half = resident // 2
        raced = fast and computed == "float32" and has_fast("bfloat16")
        if raced and 2 * states + resident + half < budget // 2:
            part = (budget - resident - half) // 3 + half
            self.screen = load("bfloat16", budget=part, weights=half)
            budget -= part
        streams = outside is not None and resident + states > USED_SHARE * budget
        try:
            weights = outside or 0 if streams else resident
            self.sweep = load(dtype, budget=budget, weights=weights, streamed=streams)
        except BudgetError:
            if streams or outside is None:
                raise
            streams = True
            self.sweep = load(dtype, budget=budget, weights=outside, streamed=True)
        self._prefix = checkpoint.layer_prefix
        self._weights_dtype: torch.dtype | None = getattr(torch, checkpoint.dtype, None)
        whole = isinstance(self.sweep, WholeModel)
        pieces = self.sweep if isinstance(self.sweep, WholeModel) else self.sweep.model
        self.model: Any = pieces.whole if isinstance(pieces, WholeModel) else pieces.model
        self.dtype = str(pieces.dtype).removeprefix("torch.")
        found = len(pieces.layers)
        if found != checkpoint.num_blocks:
            raise SlebError(
                f"{checkpoint.path}: config.json counts {checkpoint.num_blocks} blocks, the model "
                f"has {found}; this architecture is not supported"
            )
        self._race = (
            FastSearch(self.sweep, error=FAST_ERROR, steps=steps, screen=self.screen)
            if fast and isinstance(self.sweep, LayerSweep)
            else None
        )
        self.how = self._describe(resident, budget, streams, fast and not whole, ranks.count)

    def _describe(self, size: int, budget: int, streams: bool, races: bool, ranks: int) -> str:
        place = "read from disk layer by layer" if streams else "in memory"
        race = f", raced in {'bfloat16' if self.screen else self.dtype}" if races else ""
        shares = f", one of {ranks} processes" if ranks > 1 else ""
        return (
            f"weights {place} ({format_size(size)} in {self.dtype}){race}, within "
            f"{format_size(budget)}{shares}"
        )

    def score(
        self,
        removed: Sequence[int],
        candidates: Sequence[int],
        base: float | None,
        on_layer: Callable[[], None],
    ) -> Scores:
        """Return the losses of a step; `base` is the loss without `removed`, if known."""
        if self._race is not None:
            return self._race.score(removed, candidates, base, on_layer=on_layer)
        return self.sweep.score(removed, candidates, on_layer=on_layer)

    def repair(
        self, sequences: Sequence[Sequence[int]], removed: Sequence[int]
    ) -> tuple[list[Gap], float]:
        """Fit a repair on all processes' sequences; see `sleb_serve.selection.repair.fit`."""
        if isinstance(self.sweep, WholeModel):
            raise SlebError(
                "repair=fold: this model's layers use what other layers computed, so no block "
                "can be fitted alone; select without `repair`"
            )
        result: tuple[list[Gap], float] = fit(
            self.sweep.model, sequences, removed, self._weights_dtype, self._prefix
        )
        return result


def _own_budget(given: int | None) -> int:
    """Return the bytes that this process may use."""
    if given is not None:
        give_back_freed()
        return given
    # Processes on one machine share its memory, but not accelerators.
    shared = 1 if torch.accelerator.is_available() else processes_here()
    return default_budget() // shared


def _affordable(checkpoint: Checkpoint, ranks: Ranks, dtype: str, length: int, budget: int) -> str:
    """Replace ``auto`` by ``float32`` if 16 bits are emulated and memory allows it."""
    if dtype == "auto" and checkpoint.dtype in EMULATED and not has_fast(checkpoint.dtype):
        wide = _weights(checkpoint, "float32")[0] + _states_bytes(checkpoint, length, "float32")
        # All processes must use the same dtype.
        if all(ranks.gather([wide <= USED_SHARE * budget])):
            return "float32"
    return dtype


def _sweep(
    checkpoint: Checkpoint,
    own: Sequence[Sequence[int]],
    ranks: Ranks,
    objective: str,
    dtype: str,
    *,
    budget: int,
    weights: int,
    streamed: bool = False,
) -> LayerSweep | WholeModel:
    """Load the model in one dtype, layer by layer if its layers can run separately."""
    model = load_model(checkpoint, dtype, streamed=streamed, device=ranks.device)
    pieces = None if _is_whole(model, objective) else CausalLM(model, own[0])
    if pieces is None or not pieces.separable:
        return WholeModel(model, own, gather=ranks.gather, objective=objective)
    return LayerSweep(
        pieces,
        own,
        budget=budget,
        weights=weights,
        streamed=streamed,
        gather=ranks.gather,
        objective=objective,
    )


def _is_whole(model: Any, objective: str) -> bool:
    """Return whether layers cannot run one by one; see `sleb_serve.selection.whole_model`."""
    values = decoder_of(model.config).to_dict()
    return objective == EMBEDDING or bool(shared_sources(values, count_of(values) or 0))


def _weights(checkpoint: Checkpoint, dtype: str) -> tuple[int, int | None]:
    """Return the bytes of all weights, and of those held at once if layers are read from disk.

    The latter is None for a checkpoint in PyTorch's own format, which cannot be read in parts.
    """
    counts, stored = checkpoint.parameter_counts(), checkpoint.tensor_bytes(frozenset())
    if counts is None or stored is None:
        return sum(file.stat().st_size for file in checkpoint.weight_files()), None
    outside, blocks = counts
    total = max(1, outside + sum(blocks))
    item = stored[0] / total if dtype == "auto" else _ITEM_BYTES[dtype]
    # A layer being read is in memory twice: in the page cache and as tensors.
    return int(total * item), int((outside + 2 * max(blocks)) * item)


def _states_bytes(checkpoint: Checkpoint, length: int, dtype: str) -> int:
    hidden = checkpoint.decoder_config.get(
        "hidden_size", checkpoint.decoder_config.get("n_embd", 0)
    )
    state = length * hidden * _ITEM_BYTES.get(dtype, 2) if isinstance(hidden, int) else 0
    return (checkpoint.num_blocks + 4) * state
