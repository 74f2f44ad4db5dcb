"""What vLLM is asked for beside the manifest: refused where it would be another model.

The configurations are vLLM's. They are read by the names of their fields, of which older versions
lack some.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sleb_serve.errors import SlebError
from sleb_serve.manifest.repository import MANIFEST_NAME
from sleb_serve.protocol import CONFIG_KEY, FORMAT

_TAGGED = re.compile(r".*-sleb\d+-[0-9a-f]{8}", re.DOTALL)
_PRINTED = "use the arguments that `sleb-serve serve --dry-run` prints"


def is_pruned(model_config: Any) -> bool:
    """Whether a manifest came with the model's config."""
    config = getattr(model_config, "hf_config", None)
    return getattr(config, CONFIG_KEY, None) is not None


def check_dense(vllm_config: Any, model_config: Any, load_format: str) -> None:
    """Refuse a model without a manifest where something of the command asks for a pruned one.

    A dense model in our formats is right beside a pruned one only: its draft, or its target.

    Raises:
        SlebError: the manifest was left out, or its name was given to another model.
    """
    pair = vllm_config.speculative_config
    beside = [getattr(pair, f"{role}_model_config", None) for role in ("target", "draft")]
    if any(map(is_pruned, beside)):
        return
    for option, value in (("load", load_format), ("config", model_config.config_format)):
        if value == FORMAT:
            raise SlebError(f"--{option}-format {FORMAT} was given without a manifest; {_PRINTED}")
    name, model = model_config.served_model_name, str(model_config.model)
    exported = (Path(model) / MANIFEST_NAME).is_file()
    if isinstance(name, str) and _TAGGED.fullmatch(name) and name != model and not exported:
        raise SlebError(
            f"--served-model-name {name} is a pruned model's, and no manifest was given; "
            f"{_PRINTED}, or another name"
        )


def check_only(model_config: Any) -> None:
    """Refuse what would put other weights or another class in the place of the manifest's model.

    Raises:
        SlebError: naming the option.
    """
    for name in ("model_weights", "model_class_overrides"):
        if value := getattr(model_config, name, None):
            raise SlebError(
                f"--{name.replace('_', '-')} {value} cannot be checked against the manifest; omit "
                "the option"
            )


def check_source(model: str, elsewhere: bool) -> None:
    """Refuse a hub's model that vLLM would take from another hub than the one it is compared on.

    Raises:
        SlebError: so `elsewhere` says, and the model is no folder.
    """
    if elsewhere and not Path(model).is_dir():
        raise SlebError(
            "VLLM_USE_MODELSCOPE is set, but a manifest is checked against the Hugging Face hub; "
            f"unset it, or download {model} and give its folder"
        )
