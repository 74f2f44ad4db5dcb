"""Names shared by the package and its vLLM plugin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sleb_serve.errors import SlebError

CONFIG_KEY = "sleb"
"""Key of the `sleb_serve.manifest.pruning.Pruning` in a pruned model's Hugging Face config."""

ENTRY_POINT = "sleb"
"""The plugin's name in ``vllm.general_plugins``, for ``VLLM_PLUGINS``."""

FORMAT = "sleb"
"""The value of ``--load-format`` and ``--config-format`` for the pruned model."""

READER_KEY = "reader"
"""Key in ``--model-loader-extra-config`` of the load format that reads the files."""

READERS = (
    *("hf", "safetensors", "pt", "npcache", "dummy"),
    *("fastsafetensors", "instanttensor", "runai_streamer"),
)
"""vLLM load formats that read the files covered by the manifest's digest."""

_GUARD = "Sleb"

MANIFEST_PATH = "/sleb/manifest"
"""Path where a server reports its manifest."""


def check_reader(load_format: str) -> None:
    """Refuse a load format with files that cannot be compared with a manifest.

    Raises:
        SlebError: it is not in `READERS`.
    """
    if load_format not in READERS:
        raise SlebError(
            f"--load-format {load_format} reads other files than the checkpoint that the manifest "
            f"was made on, so sleb-serve cannot compare them; leave the option out"
        )


def guard_name(architecture: str) -> str:
    """Return the architecture name for the overrides, which vLLM does not have.

    The plugin's config parser removes it. Without the plugin, vLLM refuses to start rather than
    serve the dense model.
    """
    return f"{_GUARD}{architecture}"


def without_guard(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with a manifest and its original architecture."""
    names = config.get("architectures")
    if CONFIG_KEY not in config or not isinstance(names, list):
        return dict(config)
    plain = [n.removeprefix(_GUARD) if isinstance(n, str) else n for n in names]
    return {**config, "architectures": plain}
