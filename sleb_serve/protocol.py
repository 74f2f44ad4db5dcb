"""The names on which the package and its vLLM plugin agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sleb_serve.errors import SlebError

CONFIG_KEY = "sleb"
"""Where a pruned model's Hugging Face config holds its `sleb_serve.manifest.pruning.Pruning`."""

ENTRY_POINT = "sleb"
"""The plugin's name among the ``vllm.general_plugins``, as ``VLLM_PLUGINS`` selects by."""

FORMAT = "sleb"
"""The value of ``--load-format`` and ``--config-format`` that asks for the pruned model."""

READER_KEY = "reader"
"""Where ``--model-loader-extra-config`` names the load format that reads the files."""

READERS = (
    *("hf", "safetensors", "pt", "npcache", "dummy"),
    *("fastsafetensors", "instanttensor", "runai_streamer"),
)
"""Load formats of vLLM that read the very files whose digest is in the manifest."""

_GUARD = "Sleb"

MANIFEST_PATH = "/sleb/manifest"
"""Where a server tells which manifest it serves."""


def check_reader(load_format: str) -> None:
    """Refuse a load format whose files cannot be held against a manifest.

    Raises:
        SlebError: it is none of `READERS`.
    """
    if load_format not in READERS:
        raise SlebError(
            f"--load-format {load_format} reads other files than the checkpoint that the manifest "
            f"was made on, so sleb-serve cannot compare them; leave the option out"
        )


def guard_name(architecture: str) -> str:
    """The architecture that the overrides ask for, which no vLLM has.

    The plugin's config parser takes it out of them again; so where it does not run, vLLM refuses
    to start, rather than serve the dense model.
    """
    return f"{_GUARD}{architecture}"


def without_guard(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that holds a manifest, with the architecture that it had before."""
    names = config.get("architectures")
    if CONFIG_KEY not in config or not isinstance(names, list):
        return dict(config)
    plain = [n.removeprefix(_GUARD) if isinstance(n, str) else n for n in names]
    return {**config, "architectures": plain}
