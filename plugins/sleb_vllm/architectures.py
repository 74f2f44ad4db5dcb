"""Which architectures can be served pruned, and what they are called then. Imports nothing.

The equality that makes one *proven*: prompt log-probabilities and a greedy continuation of a tiny
random model, pruned in vLLM, against Transformers with the blocks deleted.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

CONFIG_KEY = "sleb"
"""Where the Hugging Face config of a pruned model holds its `sleb_serve.pruning.Pruning`."""

DENSE_KEY = "sleb_dense"
"""Where the config.json of a pruned model's own folder keeps what the dense one says instead."""

ENTRY_POINT = "sleb"
"""The plugin's name among the ``vllm.general_plugins``, as ``VLLM_PLUGINS`` selects by."""

MANIFEST_PATH = "/sleb/manifest"
"""Where a server tells which manifest it serves."""


def _causal(names: str) -> frozenset[str]:
    return frozenset(f"{name}ForCausalLM" for name in names.split())


PROVEN = frozenset({"GPT2LMHeadModel"}) | _causal(
    "Afmoe Apertus Arcee Bloom Cohere Cwm Ernie4_5 Exaone4 ExaoneMoe Falcon FlexOlmo GPTBigCode "
    "GPTJ GPTNeoX Gemma Gemma2 Gemma3 Gemma4 Glm Glm4 Glm4Moe GptOss Granite GraniteMoe "
    "GraniteMoeHybrid GraniteMoeSWA GraniteMoeShared GraniteSWA HunYuanDenseV1 HunYuanMoEV1 "
    "HyperCLOVAX Jais2 Llama Llama4 Mellum MiniCPM3 Ministral3 Mistral Mixtral Nemotron OPT Olmo "
    "Olmo2 Olmo3 Olmoe Phi Phi3 Qwen2 Qwen2Moe Qwen3 Qwen3Moe SeedOss SmolLM3 StableLm "
    "Starcoder2 VaultGemma"
)
"""Architectures whose pruned form is tested to equal Transformers with the blocks deleted."""

_DENSE_DIFFERS = "vLLM and Transformers differ already when dense, so equality cannot be shown"
_NO_ORACLE = "untested: no tiny model of it was found that Transformers and vLLM both load"

EXPECTED: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(
        _causal("Cohere2 Cohere2Moe DeepseekV2 DeepseekV3 Ernie4_5_Moe Glm4MoeLite"),
        _DENSE_DIFFERS,
    )
    | dict.fromkeys(
        {"ChatGLMModel", "ChatGLMForConditionalGeneration"}
        | _causal(
            "AXK1 BailingMoe BailingMoeV2 Dbrx DeciLM Deepseek Exaone ExaoneMoE HYV3 IQuestCoder "
            "InternLM2 InternLM3 K2Horizon LLaMA Laguna LongcatFlash MiMo MiMoV2 MiMoV2Flash "
            "MiniCPM MiniMaxM2 MistralLarge3 Nanbeige Orion PanguEmbedded PanguProMoEV2 "
            "PanguUltraMoE Param2MoE PhiMoE Plamo3 Rnj1 SarvamMLA SarvamMoE Solar Step1 Step3Text "
            "Step3p5 TeleChat2 TeleChat3 TeleFLM"
        ),
        _NO_ORACLE,
    )
)
"""Architectures that are served pruned by the same mechanism, untested, and why untested."""

_RECURRENT = "its layers keep recurrent state besides KV cache, which no test here can run"
_SHARED = "its layers use what other layers computed, so a gap changes those that stay"
_MANY = "its loop carries more from layer to layer than a hidden state and a residual"
_NEWER = "one of vLLM's GPU-only model definitions, which cannot be built where this is tested"

REFUSED: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(
        _causal(
            "BailingMoeV2_5 BailingMoeV3 FalconH1 FalconMamba Jamba Lfm2 Lfm2Moe Mamba Mamba2 "
            "NemotronH NemotronHPuzzle OlmoHybrid Qwen3Next Qwen3_5 Qwen3_5Moe Zamba2"
        ),
        _RECURRENT,
    )
    | dict.fromkeys(_causal("DeepseekV32 Gemma3n GlmMoeDsa MiniMaxM3Sparse"), _SHARED)
    | dict.fromkeys(_causal("DeepseekV4 Glm5Next KimiLinear Qwen4Exp"), _MANY)
    | dict.fromkeys(_causal("HYV4 Inkling MuseGlimmer"), _NEWER)
    | dict.fromkeys(_causal("HrmText IQuestLoopCoder"), "it runs its layers more than once")
    | dict.fromkeys(_causal("LongcatFlashNgram"), "its embedding is one of several lists of layers")
)
"""Architectures of vLLM's text models that are not served pruned, and why."""

ARCHITECTURES = PROVEN | EXPECTED.keys()
"""Architectures that can be served pruned."""


def pruned_name(architecture: str) -> str:
    """The architecture name that asks for the pruned form; a vLLM without the plugin has none."""
    return f"Sleb{architecture}"


def why_refused(architecture: str) -> str:
    """Why an architecture outside `ARCHITECTURES` is not served pruned, as a message."""
    reason = REFUSED.get(architecture, "it is not a text model that this release knows")
    return (
        f"{architecture} cannot be served pruned: {reason}; `sleb-serve architectures` lists "
        f"those that can"
    )
