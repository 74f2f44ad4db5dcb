"""A model's sizes, from its safetensors headers or from its config alone.

Headers describe the stored tensors of any model, in a folder or on the hub, where they are read
without the weights. Without headers, Transformers builds the model on the meta device from its
config.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.checkpoint.decoder import at, decoder_path, decoder_prefix, number_after
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.checkpoint.quantisation import QUANTISATION_KEYS
from sleb_serve.checkpoint.safetensors import tensors_of
from sleb_serve.cut.layers import layers_path, meta_model
from sleb_serve.cut.likeness import transformers_config
from sleb_serve.cut.whole import explicit
from sleb_serve.errors import SlebError, first_line
from sleb_serve.roofline.cache import caches_of, first, heads_of, hidden_of
from sleb_serve.roofline.model import MODELS, Block, Cache, Model
from sleb_serve.roofline.quantised import EXPERTS_ONLY, bytes_of, is_left, parameters_in
from sleb_serve.utils import strict_json
from sleb_serve.utils.extras import COMPARES, require

_EXPERTS = frozenset(("experts",))
_FUSED_EXPERTS = frozenset(("input_linear", "output_linear"))
"""Names of three-dimensional matrices of all experts, such as Granite's."""
_ROUTERS = frozenset(("e_score_correction_bias",))
"""Name components of the router."""
_NUM_EXPERTS = (
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    *("num_routed_experts",),
)
_ACTIVE = ("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


@dataclass(frozen=True)
class Tensor:
    """A stored tensor: its name, parameters, bytes and dimensions."""

    name: str
    parameters: float
    stored: float
    dimensions: int


def read_model(model: str) -> Model:
    """Read a model by name in `MODELS`, checkpoint folder, config.json or hub id.

    Raises:
        SlebError: it does not exist, or its sizes are incomplete.
    """
    if model in MODELS:
        return MODELS[model]
    path = Path(model)
    if path.is_file():
        config = strict_json.any_object(strict_json.load(path.read_bytes()), model)
        return from_config(Checkpoint(path.parent, config), path.parent.name)
    checkpoint = open_checkpoint(model)
    name = path.resolve().name if path.is_dir() else model
    stored = _stored(checkpoint) or (None if path.is_dir() else _on_hub(model, checkpoint))
    if stored is None:
        return from_config(checkpoint, name)
    prefix = decoder_prefix([tensor.name for tensor in stored], checkpoint.num_blocks)
    return _served(checkpoint, _assembled(stored, prefix, derived(checkpoint), name))


def derived(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return the decoder's config, with Transformers' derived values if it is installed.

    These are the layer types, if config.json defines them by position.
    """
    config: Mapping[str, Any] = checkpoint.config
    found = transformers_config(checkpoint.path)
    if found is None:
        return checkpoint.decoder_config
    said = explicit(config, found.to_dict())
    whole = found.to_dict()
    values = at(whole, decoder_path(whole) or ()) or {}
    return {**values, **(at(said, decoder_path(said) or ()) or {})}


def from_config(checkpoint: Checkpoint, name: str) -> Model:
    """Return the sizes of the model that Transformers builds from a config.json.

    Raises:
        SlebError: Transformers does not know it or is not installed, or the size of its
            quantisation is unknown.
    """
    require("the size of a model from config.json alone", *COMPARES)
    config = transformers_config(checkpoint.path)
    try:
        if config is None:
            raise SlebError("Transformers does not know this kind of model")
        model = meta_model(_class(checkpoint, config), config)
        prefix = layers_path(model) + "."
    except Exception as error:
        raise SlebError(
            f"no plan from {checkpoint.path}/config.json alone: {first_line(error)}; give a folder "
            f"or a hub id with the safetensors files"
        ) from error
    tensors = list(_on_meta(checkpoint, model, prefix))
    return _served(checkpoint, _assembled(tensors, prefix, derived(checkpoint), name))


def _class(checkpoint: Checkpoint, config: Any) -> Any:
    import transformers

    kind = getattr(transformers, checkpoint.architecture, None)
    if kind is not None:
        return kind
    return transformers.AutoModelForCausalLM._model_mapping[type(config)]


def _stored(checkpoint: Checkpoint) -> list[Tensor] | None:
    """Read a folder's safetensors headers; None if files are missing."""
    try:
        files = checkpoint.weight_files()
    except SlebError:
        return None
    if files[0].suffix != ".safetensors":
        return None
    quantisation = _quantisation(checkpoint)
    return [
        _tensor(quantisation, name, dtype, shape, end - start)
        for file in files
        for name, (dtype, shape, start, end) in tensors_of(file).items()
    ]


def _tensor(
    quantisation: Mapping[str, Any] | None, name: str, dtype: str, shape: Sequence[int], stored: int
) -> Tensor:
    numbers: float = math.prod(shape)
    if quantisation is not None:
        numbers = parameters_in(quantisation, name, dtype, math.prod(shape), stored)
    return Tensor(name, numbers, stored, len(shape))


def _on_hub(model: str, checkpoint: Checkpoint) -> list[Tensor] | None:
    """Read a hub model's safetensors headers; None if there are none."""
    from huggingface_hub import get_safetensors_metadata

    try:
        found = get_safetensors_metadata(model, revision=checkpoint.path.name)
    except Exception:
        # Not reachable, or another format: use the config.
        return None
    quantisation = _quantisation(checkpoint)
    return [
        _tensor(
            quantisation,
            name,
            info.dtype,
            info.shape,
            info.data_offsets[1] - info.data_offsets[0],
        )
        for file in found.files_metadata.values()
        for name, info in file.tensors.items()
    ]


def _on_meta(checkpoint: Checkpoint, model: Any, prefix: str) -> Iterator[Tensor]:
    """Return a meta-device model's tensors as its checkpoint would store them."""
    size = _SIZES.get(checkpoint.dtype, 2)
    quantisation = _quantisation(checkpoint)
    kept = model.state_dict()
    parameters = dict(model.named_parameters())
    buffers = {n: b for n, b in model.named_buffers() if n in kept}
    for name, tensor in {**parameters, **buffers}.items():
        stored = float(tensor.numel()) * (
            size if tensor.is_floating_point() else tensor.element_size()
        )
        if quantisation is not None and name.startswith(prefix):
            stored = _quantised(model, name, tensor, quantisation, size) or stored
        yield Tensor(name, tensor.numel(), stored, tensor.ndim)


def _quantised(
    model: Any, name: str, tensor: Any, quantisation: Mapping[str, Any], size: int
) -> float | None:
    """Return the bytes of quantised matrices, also of all experts; None if unquantised."""
    owner, _, _ = name.rpartition(".")
    if is_left(owner, quantisation):
        return None
    if _EXPERTS.intersection(name.split(".")) and tensor.ndim == 3:
        count, rows, columns = map(int, tensor.shape)
        return count * bytes_of(quantisation, rows, columns, size)
    import torch

    linear = isinstance(model.get_submodule(owner), torch.nn.Linear) and tensor.ndim == 2
    if linear and quantisation.get("quant_method") not in EXPERTS_ONLY:
        return bytes_of(quantisation, tensor.shape[0], tensor.shape[1], size)
    return None


def _quantisation(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """Return the quantisation config; None if unquantised."""
    for config in (checkpoint.config, checkpoint.decoder_config):
        for key in QUANTISATION_KEYS:
            if isinstance(found := config.get(key), Mapping):
                return found
    return next(iter(checkpoint.quantisation_files().values()), None)


def _served(checkpoint: Checkpoint, model: Model) -> Model:
    """Return the sizes in vLLM, which runs a float32 checkpoint in 16 bits."""
    wide = model.stored > 3 * model.parameters and not checkpoint.is_quantised()
    return model.in_16_bit() if wide else model


def is_expert(tensor: Tensor) -> bool:
    """Return whether a tensor belongs to routed experts."""
    parts = tensor.name.split(".")
    if parts[-1] in _ROUTERS:
        return False
    fused = tensor.dimensions == 3 and not _FUSED_EXPERTS.isdisjoint(parts)
    return fused or not _EXPERTS.isdisjoint(parts)


def _assembled(
    tensors: Iterable[Tensor], prefix: str, values: Mapping[str, Any], name: str
) -> Model:
    """Build the model from stored tensors; ``values`` is its decoder's config."""
    caches = caches_of(values)
    own = [[0.0, 0.0] for _ in caches]
    routed = [[0.0, 0.0] for _ in caches]
    outside = [0.0, 0.0]
    for tensor in tensors:
        number = number_after(tensor.name, prefix)
        place = outside
        if number is not None and number < len(caches):
            place = (routed if is_expert(tensor) else own)[number]
        place[0] += tensor.parameters
        place[1] += tensor.stored
    blocks = tuple(map(_block_maker(values), own, routed, caches))
    return Model(
        name,
        blocks,
        hidden_of(values),
        heads_of(values),
        first(values, ("vocab_size",)),
        outside[0],
        outside[1],
    )


def _block_maker(values: Mapping[str, Any]) -> Any:
    def block(own: list[float], routed: list[float], cache: Cache) -> Block:
        if not routed[0]:
            return Block(own[0], own[1], cache)
        count, active = first(values, _NUM_EXPERTS), first(values, _ACTIVE)
        if active > count:
            raise SlebError(f"config.json says that each token takes {active} of {count} experts")
        one = (routed[0] / count, routed[1] / count)
        return Block(own[0], own[1], cache, count, active, *one)

    return block
