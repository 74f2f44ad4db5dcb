"""Config files of the shorter model."""

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
    """Return the modules with weights and their names after `cut`."""
    modules = frozenset(name.rpartition(".")[0] for name in checkpoint.tensor_names)
    return Names(modules, cut, checkpoint.layer_prefix)


def written_config(
    checkpoint: Checkpoint, cut: Cut, derived: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return config.json of the shorter model.

    Args:
        checkpoint: the dense model.
        cut: the removed layers.
        derived: config.json as loaded by Transformers; None if it does not know the model.

    Raises:
        SlebError: it cannot be expressed for fewer layers; the message names the key.
    """
    config = checkpoint.config if derived is None else explicit(checkpoint.config, derived)
    try:
        return cut_config(config, cut, module_names(checkpoint, cut))
    except SlebError as error:
        raise SlebError(f"{checkpoint.path}/config.json: {error}") from None


def written_quantisation(checkpoint: Checkpoint, cut: Cut) -> dict[str, Any]:
    """Return the contents of separate quantisation config files for the shorter model."""
    files = checkpoint.quantisation_files()
    if not files:
        return {}
    names = module_names(checkpoint, cut)
    return {name: renumbered(content, names) for name, content in files.items()}


def with_quantisation(
    checkpoint: Checkpoint, config: Mapping[str, Any], cut: Cut
) -> dict[str, Any]:
    """Renumber the layers in a config's quantisation entry.

    Args:
        checkpoint: the dense model.
        config: the dense config. If only a separate file describes the quantisation, the result
            includes that file's content.
        cut: the removed layers.
    """
    result = dict(config)
    beside = checkpoint.quantisation_files()
    own = result.get(_KEY)
    inner = (at(result, decoder_path(result) or ()) or {}).get(_KEY)
    more = beside.get(QUANTISATION_FILES[0], {}).get("quantization")
    if not isinstance(own, Mapping) and not isinstance(inner, Mapping) and beside:
        result[_KEY] = next(iter(beside.values()))
    elif isinstance(own, Mapping) and isinstance(more, Mapping) and "quantized_layers" in more:
        # ModelOpt's list of layer names may be only in the file.
        result[_KEY] = {"quantized_layers": more["quantized_layers"], **own}
    return with_names(result, module_names(checkpoint, cut))
