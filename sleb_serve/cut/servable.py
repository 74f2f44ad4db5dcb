"""Shared check for select, import, check, export and serve that blocks can be removed.

`sleb_serve.cut.likeness` compares both the plugin's config and an exported config.json with the
dense model.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.checkpoint.decoder import COUNT_KEYS, decoder_path
from sleb_serve.compat.architectures import check_known, config_says_all
from sleb_serve.cut.config import Cut
from sleb_serve.cut.likeness import apply, compared, not_compared, transformers_config
from sleb_serve.cut.whole import cut_config
from sleb_serve.cut.written import written_config
from sleb_serve.errors import SlebError
from sleb_serve.utils.extras import MissingExtraError, install_hint, missing
from sleb_serve.utils.scratch import ScratchFolder

_LOG = logging.getLogger(__name__)

VLLM_PERIODS: Mapping[str, int | str] = MappingProxyType(
    {
        "GptOssForCausalLM": 2,
        "Llama4ForCausalLM": "interleave_moe_layer_step",
        "Llama4ForConditionalGeneration": "interleave_moe_layer_step",
    }
)
"""Architectures for which vLLM derives a layer's type from its number modulo a period, ignoring the
config's list, with the period or its key. The plugin's loader handles this; stock vLLM cannot.
"""


def check_servable(checkpoint: Checkpoint, cut: Cut) -> bool:
    """Run `compare_layers` and log a warning if nothing was compared."""
    found = compare_layers(checkpoint, cut)
    if not found:
        _warn()
    return found


def compare_layers(checkpoint: Checkpoint, cut: Cut) -> bool:
    """Refuse models that cannot be served with fewer layers, before using any GPU.

    Returns:
        Whether the kept layers were compared with the dense model's; False if Transformers does not
        know the model or is not installed.

    Raises:
        SlebError: names the config's key or the layer's attribute.
    """
    config = transformers_config(checkpoint.path)
    dense = copy.deepcopy(config)
    try:
        if config is None:
            cut.values(checkpoint.decoder_config)
        else:
            apply(config, cut)
        return compared(dense, config, checkpoint.architecture, cut)
    except SlebError as error:
        raise SlebError(
            f"{checkpoint.path} cannot be exported without these blocks: {error}"
        ) from None


def exported_config(checkpoint: Checkpoint, cut: Cut, *, for_vllm: bool = True) -> dict[str, Any]:
    """Return config.json of the exported checkpoint.

    Args:
        checkpoint: the dense model.
        cut: the removed layers.
        for_vllm: whether stock vLLM must also run it.

    Raises:
        SlebError: config.json cannot express it, or Transformers would read it differently.
        MissingExtraError: layer types depend on positions and Transformers is not installed.
    """
    dense = transformers_config(checkpoint.path)
    if missing("transformers") and not config_says_all(checkpoint.architecture):
        raise _needs_transformers(checkpoint, "may leave the kind of a layer to its position")
    config = written_config(checkpoint, cut, None if dense is None else dense.to_dict())
    if for_vllm:
        _check_periods(checkpoint, cut)
    _check_written(checkpoint, cut, dense, config)
    return config


def check_countable(checkpoint: Checkpoint, cut: Cut) -> None:
    """Refuse a model that other tools would prune incorrectly.

    They renumber the tensors and lower the layer count but do not change per-layer config entries.

    Raises:
        SlebError: names the layer's attribute that would change.
    """
    _check_periods(checkpoint, cut)
    path = decoder_path(checkpoint.config) or ()
    config = copy.deepcopy(dict(checkpoint.config))
    values = config
    for key in path:
        values = values[key]
    values.update({key: len(cut.kept) for key in COUNT_KEYS if values.get(key) == cut.num_blocks})
    if missing("transformers") and not (
        config_says_all(checkpoint.architecture) and config == cut_config(checkpoint.config, cut)
    ):
        raise _needs_transformers(checkpoint, "says more of its layers than their number")
    _check_written(checkpoint, cut, transformers_config(checkpoint.path), config)


def _check_written(checkpoint: Checkpoint, cut: Cut, dense: Any, config: Mapping[str, Any]) -> None:
    """Compare Transformers' reading of a written config with the dense model."""
    if dense is None:
        check_known(checkpoint.architecture)
        _warn()
        return
    with ScratchFolder() as folder:
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        short = transformers_config(folder)
    if short is None:
        raise SlebError(
            f"{checkpoint.path}: Transformers does not read the config without blocks "
            f"{list(cut.removed)}; serve it with sleb-serve serve instead"
        )
    try:
        if not compared(dense, short, checkpoint.architecture, cut):
            _warn()
    except SlebError as error:
        raise SlebError(
            f"{checkpoint.path} cannot be exported without these blocks: {error}; or serve it with "
            "sleb-serve serve"
        ) from None


def _warn() -> None:
    _LOG.warning("kept layers: %s", not_compared())


def _needs_transformers(checkpoint: Checkpoint, why: str) -> MissingExtraError:
    return MissingExtraError(
        f"{checkpoint.path}: the config of {checkpoint.architecture} {why}, so writing the shorter "
        f"model needs transformers: {install_hint('transformers')}"
    )


def _check_periods(checkpoint: Checkpoint, cut: Cut) -> None:
    period = VLLM_PERIODS.get(checkpoint.architecture, 1)
    if isinstance(period, str):
        period = int(checkpoint.decoder_config.get(period) or 1)
    moved = next((old for old, new in cut.places.items() if (old - new) % period), None)
    if moved is not None:
        raise SlebError(
            f"{checkpoint.path}: vLLM derives the kind of a layer of {checkpoint.architecture} "
            f"from its number, so without sleb-serve it would run layer {moved} as another kind; "
            f"serve it with sleb-serve serve, or export it for=transformers alone"
        )
