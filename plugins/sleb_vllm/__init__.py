"""vLLM plugin: serve a model without the decoder layers that a manifest removes.

A pruned model is an ordinary model with fewer layers. The plugin registers a config parser that
cuts the config (``--config-format sleb``) and a model loader that skips the tensors of removed
layers and renumbers the others (``--load-format sleb``), both in vLLM's own registries. vLLM's
unchanged model class does the rest. The removed blocks travel in ``--hf-overrides`` and then in the
Hugging Face config: to every worker, and into torch.compile's cache key.

Importing this package costs nothing; vLLM is imported when the plugin is loaded.
"""

from __future__ import annotations

from typing import Any

__all__ = ["endpoint", "register"]


def register() -> None:
    """Entry point of ``vllm.general_plugins``, which vLLM calls in every process."""
    from sleb_serve.utils.ending import keep_signals_apart
    from sleb_vllm.config_parser import register_parser
    from sleb_vllm.loader import register_loader

    keep_signals_apart()
    register_parser()
    register_loader()


def endpoint() -> Any:
    """Entry point of ``vllm.endpoint_plugins``: see `sleb_vllm.route`.

    No module has its name, which would take its place once it is imported.
    """
    from sleb_vllm.route import ManifestEndpoint

    return ManifestEndpoint()
