"""``--config-format sleb``: the Hugging Face config of the model with fewer layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.logger import init_logger
from vllm.transformers_utils.config import HFConfigParser, get_config_parser, register_config_parser

from sleb_serve.checkpoint.decoder import at, decoder_path
from sleb_serve.checkpoint.hub import download_weights, fetch_index, open_checkpoint
from sleb_serve.checkpoint.quantisation import QUANTISATION_KEYS
from sleb_serve.compat.architectures import check_supported
from sleb_serve.compat.vllm_versions import check_version, vllm_version
from sleb_serve.cut.layers import decoder_of
from sleb_serve.cut.likeness import apply, compared
from sleb_serve.cut.written import with_quantisation
from sleb_serve.errors import SlebError
from sleb_serve.manifest.asked import check_source
from sleb_serve.manifest.binding import check_config_binding
from sleb_serve.manifest.pruning import Pruning
from sleb_serve.manifest.repair_file import check_sidecar
from sleb_serve.protocol import CONFIG_KEY, FORMAT, guard_name, without_guard

# A child of vLLM's logger, so that messages appear in vLLM's log.
logger = init_logger("vllm.plugins.sleb")


class SlebConfigParser(HFConfigParser):
    """vLLM's own parser, with the result cut by the manifest in the overrides or in config.json.

    A config with neither is unchanged: it is a draft model's, which vLLM parses in the format of
    its target.
    """

    def parse(
        self, model: str | Path, trust_remote_code: bool, revision: str | None = None, **kwargs: Any
    ) -> tuple[dict[str, Any], Any]:
        """Return vLLM's config for building the model. Runs before any worker starts.

        Raises:
            SlebError: the manifest is for another model, or the model cannot be cut like this.
        """
        given = kwargs.get("hf_overrides")
        overrides: dict[str, Any] = given if isinstance(given, dict) else {}
        found, config = super().parse(model, trust_remote_code, revision=revision, **kwargs)
        pruning = Pruning.of_config(overrides) or Pruning.of_config(found)
        if pruning is None:
            return found, config
        check_version(vllm_version())
        check_supported(pruning.architecture)
        check_source(str(model), envs.VLLM_USE_MODELSCOPE)
        checkpoint = open_checkpoint(str(model), revision)
        check_config_binding(checkpoint, str(model), pruning)
        if pruning.repair is not None:
            check_sidecar(pruning.repair)
        dense = copy.deepcopy(config)
        shorten(config, pruning)
        if not compared(dense, config, pruning.architecture, pruning.cut):
            logger.warning(
                "Transformers has no %s, so the kept layers were not compared with the dense "
                "model's before the start",
                pruning.architecture,
            )
        setattr(config, CONFIG_KEY, pruning.to_dict())
        if checkpoint.is_quantised():
            if not Path(model).is_dir() and not fetch_index(str(model), revision):
                download_weights(str(model), revision)
            found = with_quantisation(checkpoint, found, pruning.cut)
            inner = at(found, decoder_path(found) or ()) or {}
            for values, part in ((found, config), (inner, decoder_of(config))):
                for key in QUANTISATION_KEYS:
                    if key in values:
                        setattr(part, key, values[key])
        found = without_guard(found)
        config.architectures = [pruning.architecture]
        if CONFIG_KEY in overrides:
            # vLLM applies the remaining overrides to the returned config.
            _take_own(overrides, pruning)
        return found, config


def register_parser() -> None:
    """Register the format in vLLM. Idempotent."""
    try:
        known = isinstance(get_config_parser(FORMAT), SlebConfigParser)
    except ValueError:
        known = False
    if not known:
        register_config_parser(FORMAT)(SlebConfigParser)


def shorten(config: Any, pruning: Pruning) -> dict[str, Any]:
    """Cut a dense config in place; see `sleb_serve.cut.likeness.apply`."""
    try:
        return apply(config, pruning.cut)
    except SlebError as error:
        raise SlebError(f"{pruning.architecture} cannot be served pruned: {error}") from None


def _take_own(overrides: dict[str, Any], pruning: Pruning) -> None:
    if overrides.get("architectures") != [guard_name(pruning.architecture)]:
        raise SlebError(
            f"the overrides ask for architectures {overrides.get('architectures')}; use the "
            f"arguments that `sleb-serve serve --dry-run` prints"
        )
    for key in ("architectures", CONFIG_KEY, "auto_map"):
        overrides.pop(key, None)
