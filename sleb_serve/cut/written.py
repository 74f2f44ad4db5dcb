"""What the files of the shorter model say, beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.checkpoint.decoder import at, decoder_path
from sleb_serve.checkpoint.quantisation import QUANTISATION_FILES, QUANTISATION_KEYS
from sleb_serve.cut.config import Cut
from sleb_serve.cut.quantisation import Names, renumbered
from sleb_serve.cut.whole import cut_config, explicit, with_names
from sleb_serve.errors import SlebError

_KEY = QUANTISATION_KEYS[0]


def module_names(checkpoint: Checkpoint, cut: Cut) -> Names:
    """The modules that have weights, and their names once `cut`."""
    modules = frozenset(name.rpartition(".")[0] for name in checkpoint.tensor_names)
    return Names(modules, cut, checkpoint.layer_prefix)


def written_config(
    checkpoint: Checkpoint, cut: Cut, derived: Mapping[str, Any] | None
) -> dict[str, Any]:
    """config.json of the shorter model.

    Args:
        checkpoint: the dense model.
        cut: the layers that go.
        derived: what Transformers makes of config.json; None where it does not know the model.

    Raises:
        SlebError: it cannot be said of fewer layers; the message names the key.
    """
    config = checkpoint.config if derived is None else explicit(checkpoint.config, derived)
    try:
        return cut_config(config, cut, module_names(checkpoint, cut))
    except SlebError as error:
        raise SlebError(f"{checkpoint.path}/config.json: {error}") from None


def written_quantisation(checkpoint: Checkpoint, cut: Cut) -> dict[str, Any]:
    """The contents of the files beside config.json that say how the checkpoint is quantised."""
    files = checkpoint.quantisation_files()
    if not files:
        return {}
    names = module_names(checkpoint, cut)
    return {name: renumbered(content, names) for name, content in files.items()}


def with_quantisation(
    checkpoint: Checkpoint, config: Mapping[str, Any], cut: Cut
) -> dict[str, Any]:
    """A config with the layers that its quantisation names numbered as in the shorter model.

    Args:
        checkpoint: the dense model.
        config: the dense one. Where it says nothing of a quantisation that a file beside it
            does, the file's content is put into the result.
        cut: the layers that go.
    """
    result = dict(config)
    beside = checkpoint.quantisation_files()
    own = result.get(_KEY)
    inner = (at(result, decoder_path(result) or ()) or {}).get(_KEY)
    more = beside.get(QUANTISATION_FILES[0], {}).get("quantization")
    if not isinstance(own, Mapping) and not isinstance(inner, Mapping) and beside:
        result[_KEY] = next(iter(beside.values()))
    elif isinstance(own, Mapping) and isinstance(more, Mapping) and "quantized_layers" in more:
        # ModelOpt's list of layers by name may be in the file alone.
        result[_KEY] = {"quantized_layers": more["quantized_layers"], **own}
    return with_names(result, module_names(checkpoint, cut))
