"""The names on which the package and its vLLM plugin agree. Imports nothing."""

from __future__ import annotations

CONFIG_KEY = "sleb"
"""Where a pruned model's Hugging Face config holds its `sleb_serve.pruning.Pruning`."""

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

MANIFEST_PATH = "/sleb/manifest"
"""Where a server tells which manifest it serves."""


def guard_name(architecture: str) -> str:
    """The architecture that the overrides ask for, which no vLLM has.

    The plugin's config parser takes it out of them again; so where it does not run, vLLM refuses
    to start, rather than serve the dense model.
    """
    return f"Sleb{architecture}"
