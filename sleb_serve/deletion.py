"""A Transformers model without its removed blocks, for a while: what is served, in plain Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sleb_serve.causal_lm import decoder_layers
from sleb_serve.errors import SlebError
from sleb_serve.manifest import Golden
from sleb_serve.pruning import MAP_EPSILON, gaps
from sleb_serve.sidecar import gap_name


@contextmanager
def blocks_deleted(
    model: Any, removed: Sequence[int], repair: Mapping[str, Tensor]
) -> Iterator[None]:
    """While this is open, `model` has only its other blocks, numbered anew, and is repaired.

    Layers keep the attention type and window they were built with, and a KV cache has one entry for
    each that is left.

    Args:
        model: a causal LM; the dense model again afterwards.
        removed: the blocks to leave out.
        repair: tensors as in a sidecar: weights by name, maps and scales as ``gap.N``.

    Raises:
        SlebError: the repair is for weights that the model does not have.
    """
    layers = decoder_layers(model)
    whole, config = list(layers), model.config.get_text_config()
    kept = [index for index in range(len(whole)) if index not in set(removed)]
    with ExitStack() as stack:
        _mend(model, whole, removed, repair, stack)
        for place, index in enumerate(kept):
            for module in whole[index].modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    _set(module, "layer_idx", place, stack)
        types = getattr(config, "layer_types", None)
        _set(config, "num_hidden_layers", len(kept), stack)
        if types is not None:
            _set(config, "layer_types", [types[index] for index in kept], stack)
        _fill(layers, [whole[index] for index in kept])
        stack.callback(_fill, layers, whole)
        yield


def _fill(layers: nn.ModuleList, content: Sequence[nn.Module]) -> None:
    """Put other layers into the same list, so that whoever holds it sees them."""
    layers._modules = {str(index): layer for index, layer in enumerate(content)}


def _set(target: Any, name: str, value: Any, stack: ExitStack) -> None:
    stack.callback(setattr, target, name, getattr(target, name))
    setattr(target, name, value)


def _mend(
    model: nn.Module,
    layers: Sequence[nn.Module],
    removed: Sequence[int],
    repair: Mapping[str, Tensor],
    stack: ExitStack,
) -> None:
    parameters = dict(model.named_parameters())
    places = {gap_name(first): first for first, _ in gaps(removed)}
    for name, tensor in repair.items():
        if name in places:
            first = places[name]
            if first > 0:
                hook = layers[first - 1].register_forward_hook(_behind(tensor))
            else:
                after = next(i for i in range(len(layers)) if i not in set(removed))
                hook = layers[after].register_forward_pre_hook(_before(tensor), with_kwargs=True)
            stack.callback(hook.remove)
        elif name in parameters and parameters[name].shape == tensor.shape:
            weight = parameters[name].data
            stack.callback(weight.copy_, weight.clone())
            weight.copy_(tensor)
        else:
            raise SlebError(f"the repair is for {name}, which this model does not have as it is")


def _repaired(stream: Tensor, tensor: Tensor) -> Tensor:
    tensor = tensor.to(stream.device, stream.dtype)
    if tensor.ndim == 1:
        return stream * tensor
    unit = nn.functional.rms_norm(stream, stream.shape[-1:], eps=MAP_EPSILON)
    return stream + unit @ tensor


def _behind(tensor: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (_repaired(output[0], tensor), *output[1:])
        return _repaired(output, tensor)

    return hook


def _before(tensor: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (_repaired(args[0], tensor), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": _repaired(kwargs["hidden_states"], tensor)}

    return hook


@torch.inference_mode()
def perplexity(model: Any, windows: Sequence[Sequence[int]]) -> float:
    """Of windows [L]: exp of the mean of each window's mean loss over its L-1 predicted tokens."""
    total = 0.0
    for window in windows:
        ids = torch.tensor([list(window)], device=model.get_input_embeddings().weight.device)
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits, ids[0, 1:].to(logits.device)))
    return float(torch.tensor(total / len(windows), dtype=torch.float64).exp())


GOLDEN_TOKENS = 64


@torch.inference_mode()
def golden(
    model: Any, tokens: Sequence[int], removed: Sequence[int], repair: Mapping[str, Tensor]
) -> Golden | None:
    """What the pruned model makes of the first tokens of a text, to know a server by.

    Args:
        model: the dense model; it is left as it was.
        tokens: the text.
        removed: the blocks to leave out.
        repair: see `blocks_deleted`.

    Returns:
        None where it cannot be told: a repaired model whose weights are on disk, or no numbers.
    """
    if repair and any(parameter.is_meta for parameter in model.parameters()):
        return None
    prompt = list(tokens[:GOLDEN_TOKENS])
    ids = torch.tensor([prompt], device=model.get_input_embeddings().weight.device)
    with blocks_deleted(model, removed, repair):
        logits = model(ids, use_cache=False).logits[0, :-1].float()
    scores = logits.log_softmax(-1).gather(1, ids[0, 1:, None].to(logits.device))[:, 0]
    if not bool(scores.isfinite().all()):
        return None
    return Golden(tuple(prompt), tuple(round(float(score), 4) for score in scores))
