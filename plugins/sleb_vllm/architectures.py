"""Which architectures can be served pruned, and what they are called then. Imports nothing."""

from __future__ import annotations

ARCHITECTURES = frozenset(
    {
        "ArceeForCausalLM",
        "BloomForCausalLM",
        "CohereForCausalLM",
        "Ernie4_5ForCausalLM",
        "Exaone4ForCausalLM",
        "FalconForCausalLM",
        "GPT2LMHeadModel",
        "GPTBigCodeForCausalLM",
        "GPTJForCausalLM",
        "GPTNeoXForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "GemmaForCausalLM",
        "Glm4ForCausalLM",
        "Glm4MoeForCausalLM",
        "GlmForCausalLM",
        "GptOssForCausalLM",
        "GraniteForCausalLM",
        "GraniteMoeForCausalLM",
        "HunYuanDenseV1ForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "NemotronForCausalLM",
        "OPTForCausalLM",
        "Olmo2ForCausalLM",
        "Olmo3ForCausalLM",
        "OlmoForCausalLM",
        "OlmoeForCausalLM",
        "Phi3ForCausalLM",
        "PhiForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "SeedOssForCausalLM",
        "SmolLM3ForCausalLM",
        "StableLmForCausalLM",
        "Starcoder2ForCausalLM",
    }
)
"""Architectures whose pruned form is tested to equal Transformers with the blocks deleted."""

CONFIG_KEY = "sleb"
"""Where the Hugging Face config of a pruned model holds its `sleb_serve.pruning.Pruning`."""

ENTRY_POINT = "sleb"
"""The plugin's name among the ``vllm.general_plugins``, as ``VLLM_PLUGINS`` selects by."""


def pruned_name(architecture: str) -> str:
    """The architecture name that asks for the pruned form; a vLLM without the plugin has none."""
    return f"Sleb{architecture}"
