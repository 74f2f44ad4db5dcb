"""Tiny models that answer with a vector: embeddings and classes, for the equality matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny import COMMON, GPT, HEAD, LLAMA, SLIDING, Tiny

ENCODER: dict[str, Any] = {
    **COMMON,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
CLASSES: dict[str, Any] = {"num_labels": 3}
EMBED = "AutoModel"
CLASSIFY = "AutoModelForSequenceClassification"

TINY: dict[str, Tiny] = {
    "llama_embed": Tiny("LlamaConfig", LLAMA, auto=EMBED),
    "mistral_embed": Tiny("MistralConfig", {**LLAMA, "sliding_window": None}, auto=EMBED),
    "qwen2_embed": Tiny("Qwen2Config", LLAMA, auto=EMBED),
    "qwen3_embed": Tiny("Qwen3Config", HEAD, auto=EMBED),
    "gemma2_embed": Tiny("Gemma2Config", {**SLIDING, "query_pre_attn_scalar": 32}, auto=EMBED),
    "gemma3_embed": Tiny("Gemma3TextConfig", SLIDING, auto=EMBED),
    "gemma3_both_ways": Tiny(
        "Gemma3TextConfig", {**SLIDING, "use_bidirectional_attention": True}, auto=EMBED
    ),
    "phi3_embed": Tiny("Phi3Config", LLAMA),
    "bert_embed": Tiny("BertConfig", ENCODER, auto=EMBED),
    "roberta_embed": Tiny("RobertaConfig", ENCODER, auto=EMBED),
    "xlm_roberta_embed": Tiny(
        "XLMRobertaConfig", {**ENCODER, "position_embedding_type": "absolute"}, auto=EMBED
    ),
    "modernbert_embed": Tiny("ModernBertConfig", ENCODER, auto=EMBED),
    "nomic_bert_embed": Tiny(
        "NomicBertConfig",
        {
            **ENCODER,
            # The names of published configs, which vLLM reads.
            "activation_function": "swiglu",
            "layer_norm_epsilon": 1e-12,
            "mlp_fc1_bias": False,
            "mlp_fc2_bias": False,
            "n_embd": 128,
            "n_inner": 256,
            "n_layer": 6,
            "qkv_proj_bias": False,
            "rotary_emb_interleaved": False,
            "rotary_emb_scale_base": None,
        },
        auto=EMBED,
    ),
    "llama_classify": Tiny("LlamaConfig", {**LLAMA, **CLASSES}, auto=CLASSIFY),
    "qwen2_classify": Tiny("Qwen2Config", {**LLAMA, **CLASSES}, auto=CLASSIFY),
    "qwen3_classify": Tiny("Qwen3Config", {**HEAD, **CLASSES}, auto=CLASSIFY),
    "gemma2_classify": Tiny(
        "Gemma2Config", {**SLIDING, **CLASSES, "query_pre_attn_scalar": 32}, auto=CLASSIFY
    ),
    "gpt2_classify": Tiny("GPT2Config", {**GPT, **CLASSES}, auto=CLASSIFY),
    "jamba_classify": Tiny(
        "JambaConfig",
        {
            **LLAMA,
            **CLASSES,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "use_mamba_kernels": False,
        },
        auto=CLASSIFY,
    ),
    "bert_classify": Tiny("BertConfig", {**ENCODER, **CLASSES}, auto=CLASSIFY),
    "roberta_classify": Tiny("RobertaConfig", {**ENCODER, **CLASSES}, auto=CLASSIFY),
    "xlm_roberta_classify": Tiny("XLMRobertaConfig", {**ENCODER, **CLASSES}, auto=CLASSIFY),
    "modernbert_classify": Tiny("ModernBertConfig", {**ENCODER, **CLASSES}, auto=CLASSIFY),
}

CLS = frozenset(name for name, tiny in TINY.items() if tiny.auto == EMBED and "bert" in name)
"""Embeddings that are the first token's state; others are the last one's."""

SCORES = frozenset({"jamba_classify"})
"""Answers that vLLM gives as they are, where it makes probabilities of others."""

NOT_EQUAL: dict[str, str] = {}


def pool(name: str) -> str:
    """What vLLM is asked for: the task of `engine_jobs`."""
    return "classify" if TINY[name].auto == CLASSIFY else "embed"


def load(name: str, path: Path) -> Any:
    """The model in Transformers, of the class that made it."""
    import torch
    import transformers

    kind = getattr(transformers, TINY[name].auto)
    return kind.from_pretrained(path, dtype=getattr(torch, TINY[name].dtype)).eval()


def oracle_pooled(name: str, model: Any, prompt: Sequence[int]) -> list[float]:
    """A unit vector, or the classes' probabilities."""
    import torch

    with torch.no_grad():
        ids = torch.tensor([prompt])
        if pool(name) == "classify":
            logits = model(ids).logits[0].float()
            return (logits if name in SCORES else logits.softmax(-1)).tolist()
        states = model.base_model(ids).last_hidden_state[0, 0 if name in CLS else -1]
        return torch.nn.functional.normalize(states.float(), dim=-1).tolist()
