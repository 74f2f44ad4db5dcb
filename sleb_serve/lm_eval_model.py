"""A pruned model for lm-eval: ``--model sleb``, which takes a manifest.

``sleb-serve lm-eval`` is lm-eval's own command line with this model among its models. In a program,
importing this module registers it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.vllm_causallms import VLLM

from sleb_serve.manifest import read_manifest
from sleb_serve.serve import check_model, check_plugin, pruned_overrides


@register_model("sleb")
class PrunedVLLM(VLLM):
    """lm-eval's vLLM model, with a manifest's blocks removed.

    Args:
        pretrained: the dense model, a folder or hub id.
        manifest: path of the manifest.
        blocks: only its first so many removals.
        hf_overrides: more overrides of the model's config.
        kwargs: what lm-eval's ``vllm`` model takes.

    Raises:
        SlebError: the manifest is not for this model, or vLLM would not load the plugin.
    """

    def __init__(
        self,
        pretrained: str,
        manifest: str,
        blocks: int | None = None,
        hf_overrides: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        check_plugin()
        pruning = read_manifest(Path(manifest)).prefix(blocks).pruning()
        checkpoint = check_model(pretrained, pruning, revision=kwargs.get("revision"))
        overrides = {**(hf_overrides or {}), **pruned_overrides(pruning, checkpoint)}
        super().__init__(pretrained=pretrained, hf_overrides=overrides, **kwargs)


def run(arguments: Sequence[str]) -> None:
    """lm-eval's command line with these arguments; it exits by itself on errors."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["sleb-serve lm-eval", *arguments]
    cli_evaluate()
