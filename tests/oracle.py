"""Independent reference results; nothing here uses the package's scoring or plugin."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

THINKERS = {
    "Qwen2_5OmniForConditionalGeneration": "Qwen2_5OmniThinkerForConditionalGeneration",
    "Qwen3OmniMoeForConditionalGeneration": "Qwen3OmniMoeThinkerForConditionalGeneration",
}
"""Text parts of models with speech output."""


def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model, of the class that config.json names, or else of its model type."""
    import transformers

    (name,) = json.loads((path / "config.json").read_text())["architectures"]
    kind = getattr(transformers, THINKERS.get(name, name), transformers.AutoModelForCausalLM)
    return kind.from_pretrained(path, dtype=dtype).eval()


def decoder_layers(model: Any) -> Any:
    """The list of decoder layers: of the text model, where there are several models in one."""
    count = model.config.get_text_config().num_hidden_layers
    decoder = model.get_decoder() or model
    found = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return found[0]


class Skipped(nn.Module):
    """Runs a layer but returns its input states in the layer's output format."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        # Some models read their layers' flags (an attention type) to choose what to pass them.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        answer = self.layer(*(a.clone() if a is states else a for a in args), **kwargs)
        return (states, *answer[1:]) if isinstance(answer, tuple) else states


def skip_blocks(model: Any, removed: Sequence[int]) -> Any:
    """Let decoder blocks have no effect; indices and the config stay as they are."""
    layers = decoder_layers(model)
    for index in removed:
        layers[index] = Skipped(layers[index])
    return model


def delete_blocks(model: Any, removed: Sequence[int]) -> Any:
    """Physically delete decoder blocks, and cut the config to fit; the model is changed."""
    holder, name = next(
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == model.config.num_hidden_layers
    )
    kept = [i for i in range(len(getattr(holder, name))) if i not in set(removed)]
    setattr(holder, name, nn.ModuleList([getattr(holder, name)[i] for i in kept]))
    types = getattr(model.config, "layer_types", None)
    model.config.num_hidden_layers = len(kept)
    if types is not None:
        model.config.layer_types = [types[i] for i in kept]
    return model


def pruned(path: Path, removed: Sequence[int], dtype: torch.dtype = torch.float32) -> Any:
    return skip_blocks(load(path, dtype), removed)


def parameter_counts(model: Any) -> tuple[int, int]:
    """Numbers that a model learned and that its checkpoint holds, tied ones once, no skipped ones.

    The latter has saved buffers, too; vLLM makes parameters of some (a router's correction bias)
    and buffers of others (an activation's constants).
    """
    skipped = [m for m in model.modules() if isinstance(m, Skipped)]
    gone = {t.data_ptr() for m in skipped for t in m.state_dict().values()}
    learned = {p.data_ptr(): p.numel() for p in model.parameters() if p.data_ptr() not in gone}
    saved = {t.data_ptr(): t.numel() for t in model.state_dict().values()}
    saved = {place: count for place, count in saved.items() if place not in gone}
    return sum(learned.values()), sum(saved.values())


@torch.no_grad()
def loss(model: Any, sequences: Sequence[Sequence[int]]) -> float:
    """The official score per token: sum over sequences of mean cross-entropy x L, over all L."""
    total = 0.0
    for sequence in sequences:
        ids = torch.tensor([sequence])
        logits = model(ids, use_cache=False).logits.float()
        mean = nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
        total += float(mean) * len(sequence)
    return total / sum(map(len, sequences))


@torch.no_grad()
def divergence(dense: Any, model: Any, sequence: Sequence[int]) -> float:
    """Of the model's predictions from the dense one's: nats per predicted token."""
    of, to = (
        m(torch.tensor([sequence]), use_cache=False).logits.float().log_softmax(-1)[0, :-1]
        for m in (model, dense)
    )
    return float(nn.functional.kl_div(of, to, reduction="batchmean", log_target=True))


@torch.no_grad()
def prompt_logprobs(model: Any, prompt: Sequence[int]) -> list[float]:
    """Log-probability of each prompt token but the first."""
    ids = torch.tensor([prompt])
    logprobs = model(ids, use_cache=False).logits.float().log_softmax(-1)
    return logprobs[0, :-1].gather(1, ids[0, 1:, None])[:, 0].tolist()


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy continuation without a KV cache: deleted blocks leave gaps in the cache's indices."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def naive_search(
    path: Path,
    sequences: Sequence[Sequence[int]],
    remove: int,
    early: int = 1,
    late: int = 1,
    dtype: torch.dtype = torch.float32,
) -> list[tuple[int, dict[int, float]]]:
    """SLEB as its authors run it: the whole model once per candidate, the block deleted.

    Returns:
        Per step, the removed block and every candidate's loss.
    """
    model = load(path, dtype)
    count = model.config.num_hidden_layers
    alive = list(range(count))
    steps = []
    for _ in range(remove):
        losses = {}
        for block in alive[early : len(alive) - late]:
            removed = sorted({*range(count), block} - set(alive) | {block})
            losses[block] = _loss_without(model, removed, sequences)
        best = min(losses, key=lambda block: (losses[block], block))
        alive.remove(best)
        steps.append((best, losses))
    return steps


def _loss_without(model: Any, removed: Sequence[int], sequences: Sequence[Sequence[int]]) -> float:
    import copy

    shell = copy.copy(model)
    # A shallow copy that shares the weights and has its own list of blocks and its own config.
    memo = {id(p): p for p in model.parameters()}
    memo |= {id(b): b for b in model.buffers()}
    shell = copy.deepcopy(model, memo)
    return loss(delete_blocks(shell, removed), sequences)
