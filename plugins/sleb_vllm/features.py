"""Ways of running vLLM that a pruned model is not served in, each with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sleb_serve.errors import SlebError

LOAD_FORMATS = frozenset(
    {"auto", "hf", "safetensors", "pt", "npcache", "dummy"}
    | {"fastsafetensors", "instanttensor", "runai_streamer"}
)
"""Values of ``--load-format`` that read the very files whose digest is in the manifest."""

SPECULATIVE_METHODS = frozenset({"ngram", "ngram_gpu", "suffix", "draft_model"})
"""Speculative methods that see nothing of the target but its tokens."""


def check_features(vllm_config: Any) -> None:
    """Refuse what is not known to work with removed layers.

    Raises:
        SlebError: naming the option and the reason.
    """
    for message in _refusals(vllm_config):
        raise SlebError(message)


def _refusals(vllm_config: Any) -> Iterator[str]:
    load_format = str(vllm_config.load_config.load_format)
    if load_format not in LOAD_FORMATS:
        yield (
            f"--load-format {load_format} reads other files than the checkpoint that the manifest "
            f"was made on, so they cannot be held against it; leave the option out"
        )
    parallel = vllm_config.parallel_config
    if parallel.enable_eplb:
        yield (
            "--enable-eplb counts a model's expert layers from its config, removed ones among "
            "them; leave the option out"
        )
    if vllm_config.kv_transfer_config is not None:
        yield (
            "--kv-transfer-config: connectors count a model's layers from its config, removed "
            "ones among them; leave the option out"
        )
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in SPECULATIVE_METHODS:
        yield (
            f"speculative method {speculative.method} drafts from hidden states of the dense "
            f"model; use one of {', '.join(sorted(SPECULATIVE_METHODS))}"
        )
