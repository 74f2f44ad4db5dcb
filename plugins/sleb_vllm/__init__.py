"""vLLM plugin: build vLLM's own model definitions without the decoder layers a manifest removes.

A pruned model is asked for by an architecture name of this plugin, ``SlebLlamaForCausalLM`` for
``LlamaForCausalLM``, and by the content of a manifest, both in ``--hf-overrides``. That makes a
vLLM without the plugin refuse to start: it knows no such architecture. The overrides travel to
every worker inside vLLM's own configuration, and they are part of torch.compile's cache key.

Importing this package costs nothing; vLLM is imported when the plugin is loaded.
"""

from __future__ import annotations

from typing import Any

from sleb_vllm.architectures import ARCHITECTURES, CONFIG_KEY, pruned_name

__all__ = ["ARCHITECTURES", "CONFIG_KEY", "endpoint", "pruned_name", "register"]


def register() -> None:
    """Entry point of ``vllm.general_plugins``: make the pruned architectures known to vLLM.

    vLLM calls it in every process, possibly more than once. A process that loads none of these
    architectures runs none of this package's other code.
    """
    from sleb_vllm.registry import register_pruned_architectures

    register_pruned_architectures()


def endpoint() -> Any:
    """Entry point of ``vllm.endpoint_plugins``: see `sleb_vllm.endpoint`."""
    from sleb_vllm.endpoint import ManifestEndpoint

    return ManifestEndpoint()
