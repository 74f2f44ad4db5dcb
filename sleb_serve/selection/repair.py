"""Closed-form repair of a pruned model: the linear part of the removed blocks.

A run of removed blocks leaves a gap. The dense model gives the states that should leave it; the
pruned model, with earlier gaps repaired, gives those that enter it. A ridge regression to the
missing difference is fitted gap by gap in one pass over the layers, without training. A *fold*
changes the last projection of the block before the gap: it maps that projection's inputs to the
missing difference and is merged into its weight, so serving costs nothing (as in ReplaceMe, arXiv
2505.02819, which folds a map of the projection's output).

Only the block before a gap is refitted. Refitting the blocks after it as well overfits the text:
fitted on 48 sequences of 512 tokens of WikiText-2, SmolLM2 minus 6 blocks has perplexity 29.6 on
its test split and 24.5 on Python's help topics, against 30.3 and 22.8.

Tokens are weighted by the inverse of their squared norm. Later layers normalise each token, so
relative errors matter; otherwise the first tokens of a text, with a thousand times the norm of the
others, would dominate the fit (massive activations, arXiv 2402.17762).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sleb_serve.errors import SlebError
from sleb_serve.manifest.blocks import gaps
from sleb_serve.models.layerwise import Call, CausalLM
from sleb_serve.selection.lm_head import Vocabulary

RIDGES = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
"""Candidate ridge strengths, in units of the inputs' mean square."""
_HELD_OUT = 4
"""One sequence in this many is held out to choose the strength."""
_PROJECTIONS = ("mlp.down_proj", "fc2", "mlp.fc2", "mlp.dense_4h_to_h")
"""Possible names of a block's last projection; checked by `_is_last`."""


@dataclass(frozen=True)
class Gap:
    """The repair of one run of removed blocks.

    Attributes:
        first: the first removed block of the run.
        last: the last one.
        name: checkpoint name of the replaced weight.
        weight: the new weight [d, inputs].
        ridge: the chosen strength.
        missing: unexplained share of the missing difference's (weighted) square on held-out text.
    """

    first: int
    last: int
    name: str
    weight: Tensor
    ridge: float
    missing: float


@torch.inference_mode()
def fit(
    model: CausalLM,
    sequences: Sequence[Sequence[int]],
    removed: Sequence[int],
    dtype: torch.dtype | None = None,
    prefix: str | None = None,
) -> tuple[list[Gap], float]:
    """Fit a repair for every gap, from the first to the last.

    Args:
        model: the dense model.
        sequences: at least four sequences of token ids; every fourth is used to choose the
            strength.
        removed: the removed blocks.
        dtype: dtype of the checkpoint's weights, also used for folds; None for the model's.
        prefix: prefix of the layer numbers in the checkpoint's names; None for the model's.

    Returns:
        The repairs, and the loss on the same sequences with them, in nats per predicted token.

    Raises:
        SlebError: there is too little text, or the model's blocks do not support folds.
    """
    if len(sequences) < _HELD_OUT:
        raise SlebError(
            f"`repair` needs at least {_HELD_OUT} sequences, one of them to choose the strength of "
            f"the regression; ask for more `sequences`"
        )
    runs = gaps(removed)
    ends = {last: first for first, last in runs}
    before = {first - 1 for first, _ in runs}
    if -1 in before:
        raise SlebError(
            "repair=fold changes the block before each gap, and block 0 is removed; keep it "
            "(early_barrier=1)"
        )
    begun = [model.begin(sequence) for sequence in sequences]
    dense, calls = [state for state, _ in begun], [calls for _, calls in begun]
    pruned = list(dense)
    folded = _Folded("", torch.empty(0), [])
    found: list[Gap] = []
    for index in range(len(model.layers)):
        with model.loaded(index) as layer:
            dense = [model.run(layer, [s], c[index])[0] for s, c in zip(dense, calls, strict=True)]
            if index not in set(removed):
                work = [(layer, s, c[index]) for s, c in zip(pruned, calls, strict=True)]
                if index in before:
                    pruned, folded = _run_and_watch(model, index, work, prefix)
                else:
                    pruned = [model.run(layer, [s], c)[0] for layer, s, c in work]
        if index in ends:
            run = (ends[index], index)
            gap, pruned = _mend(run, pruned, dense, folded, dtype or model.dtype)
            found.append(gap)
    vocabulary = Vocabulary(model)
    losses = []
    for state, sequence in zip(pruned, sequences, strict=True):
        normed = model.normed(state)[:-1]
        losses.append(vocabulary.loss(normed, torch.tensor(sequence[1:], device=normed.device)))
    return found, sum(losses) / len(losses)


@dataclass(frozen=True)
class _Folded:
    """The last projection of the block before a gap, and its inputs, [L, p] per sequence."""

    name: str
    weight: Tensor
    inputs: list[Tensor]


Piece = Callable[[int], tuple[Tensor, Tensor, Tensor]]


def _mend(
    run: tuple[int, int],
    pruned: list[Tensor],
    dense: list[Tensor],
    folded: _Folded,
    dtype: torch.dtype,
) -> tuple[Gap, list[Tensor]]:
    """Fit one gap's repair, with a weight of the given dtype, and the states after it."""

    def piece(number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs [L, p], missing differences [L, d] and weights [L, 1]."""
        state, goal = pruned[number][0].double(), dense[number][0].double()
        weight = goal.square().sum(1, keepdim=True).clamp(min=1e-12).reciprocal()
        return folded.inputs[number].double(), goal - state, weight

    change, ridge, left = _ridge(piece, len(pruned))
    old = folded.weight
    weight = (old.double() + change.T).to(dtype)
    change = (weight.double() - old.double()).T
    moved = [
        (state.double() + piece(number)[0] @ change).to(state.dtype)
        for number, state in enumerate(pruned)
    ]
    return Gap(*run, folded.name, weight.contiguous(), ridge, left), moved


def _ridge(piece: Piece, count: int) -> tuple[Tensor, float, float]:
    """Fit a weighted ridge regression from inputs to missing differences over all sequences.

    Returns:
        The map [p, d]; the best strength on the held-out sequences; the unexplained share there.
    """
    squares: list[Tensor | float] = [0.0, 0.0]
    products: list[Tensor | float] = [0.0, 0.0]
    whole = 0.0
    for number in range(count):
        x, y, w = piece(number)
        held_out = number % _HELD_OUT == _HELD_OUT - 1
        weighted = (x * w).T
        squares[held_out] = squares[held_out] + weighted @ x
        products[held_out] = products[held_out] + weighted @ y
        whole += float((w * y * y).sum()) if held_out else 0.0
    (square, other_square), (product, other_product) = squares, products

    def solve(square: Any, product: Any, ridge: float) -> Any:
        strength = ridge * float(square.diagonal().mean())
        unit = torch.eye(len(square), dtype=square.dtype, device=square.device)
        return torch.linalg.solve(square + strength * unit, product)

    tried: dict[float, float] = {}
    for ridge in RIDGES:
        change = solve(square, product, ridge)
        explained = 2 * (change * other_product).sum() - (change * (other_square @ change)).sum()
        tried[ridge] = 1 - float(explained) / whole
    best = min(tried, key=lambda ridge: tried[ridge])
    if tried[best] >= 1:
        # The fit does not generalise, so leave the gap unrepaired.
        return torch.zeros_like(product), best, 1.0
    result: Tensor = solve(square + other_square, product + other_product, best)
    return result, best, tried[best]


def _run_and_watch(
    model: CausalLM, index: int, work: list[tuple[Any, Tensor, Call]], prefix: str | None
) -> tuple[list[Tensor], _Folded]:
    """Run a layer on states, and record the inputs of its last projection.

    Raises:
        SlebError: the layer does not end in a projection added directly to the residual stream.
    """
    block = model.layers[index]
    projection = next(
        (m for n, m in block.named_modules() if n in _PROJECTIONS and isinstance(m, nn.Linear)),
        None,
    )
    own = next(
        (n for n, p in block.named_parameters() if projection and p is projection.weight), None
    )
    if projection is None or own is None or not _is_last(model, projection, *work[0]):
        raise SlebError(
            f"repair=fold: {type(block).__name__} does not end in a projection whose output is "
            f"added to the stream as it is; select without `repair`"
        )
    inputs: list[Tensor] = []
    hook = projection.register_forward_pre_hook(
        # Some models flatten the tokens.
        lambda _, args: inputs.append(args[0].flatten(0, -2).clone())
    )
    try:
        moved = [model.run(layer, [state], call)[0] for layer, state, call in work]
    finally:
        hook.remove()
    if prefix is None:
        prefix = next(n for n, m in model.model.named_modules() if m is model.layers) + "."
    return moved, _Folded(f"{prefix}{index}.{own}", projection.weight.detach().clone(), inputs)


def _is_last(model: CausalLM, projection: nn.Module, layer: Any, state: Tensor, call: Call) -> bool:
    """Return whether a change of the projection's output changes the layer's output equally."""
    before = model.run(layer, [state], call)[0]
    step = before.abs().mean()
    hook = projection.register_forward_hook(lambda _, args, output: output + step)
    try:
        after = model.run(layer, [state], call)[0]
    finally:
        hook.remove()
    return bool(((after - before - step).abs().mean() < 0.02 * step).item())
