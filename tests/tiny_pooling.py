"""Tiny pooling models with embeddings and classes, for the equality matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny import COMMON, GPT, HEAD, LLAMA, SLIDING, Tiny
from tiny_hybrid import JAMBA

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
CLASSIFY_TOKENS = "AutoModelForTokenClassification"
STEP = 5
"""The token after which a process's reward is asked for: one of `engines.PROMPTS` has two."""

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
    "jamba_classify": Tiny("JambaConfig", {**JAMBA, **CLASSES}, auto=CLASSIFY),
    "bert_classify": Tiny("BertConfig", {**ENCODER, **CLASSES}, auto=CLASSIFY),
    "roberta_classify": Tiny("RobertaConfig", {**ENCODER, **CLASSES}, auto=CLASSIFY),
    "xlm_roberta_classify": Tiny("XLMRobertaConfig", {**ENCODER, **CLASSES}, auto=CLASSIFY),
    "modernbert_classify": Tiny("ModernBertConfig", {**ENCODER, **CLASSES}, auto=CLASSIFY),
    **{
        f"{name}_tokens": Tiny(config, {**ENCODER, **CLASSES}, auto=CLASSIFY_TOKENS)
        for name, config in (
            ("bert", "BertConfig"),
            ("roberta", "RobertaConfig"),
            ("xlm_roberta", "XLMRobertaConfig"),
            ("modernbert", "ModernBertConfig"),
        )
    },
    "qwen2_reward": Tiny("Qwen2Config", LLAMA, architecture="Qwen2ForRewardModel"),
    "qwen2_process_reward": Tiny(
        "Qwen2Config",
        LLAMA,
        architecture="Qwen2ForProcessRewardModel",
        engine={"pooler_config": {"step_tag_id": STEP}},
    ),
}

CLS = frozenset(name for name, tiny in TINY.items() if tiny.auto == EMBED and "bert" in name)
"""Embeddings that are the first token's state; others are the last one's."""

SCORES = frozenset({"jamba_classify", "qwen2_reward"})
"""Answers that vLLM gives as they are, where it makes probabilities of others."""

REWARDS = {"qwen2_reward": 1, "qwen2_process_reward": 2}
"""How many scores a token has from a head of two layers, which Transformers has no class with."""

NOT_EQUAL: dict[str, str] = {
    "InternLM2ForRewardModel": "untested: Transformers has no InternLM2",
}


def pool(name: str) -> str:
    """What vLLM is asked for: the task of `engine_jobs`."""
    if name in REWARDS or TINY[name].auto == CLASSIFY_TOKENS:
        return "token_classify"
    return "classify" if TINY[name].auto == CLASSIFY else "embed"


def add_head(name: str, path: Path) -> None:
    """Write a reward model's head beside the weights that Transformers saved."""
    import torch
    from safetensors.torch import load_file, save_file

    if name in REWARDS:
        weights = load_file(path / "model.safetensors")
        for layer, rows in ((0, 128), (2, REWARDS[name])):
            weights[f"score.{layer}.weight"] = torch.randn(rows, 128) * 0.1
            weights[f"score.{layer}.bias"] = torch.randn(rows) * 0.1
        save_file(weights, path / "model.safetensors", {"format": "pt"})


def load(name: str, path: Path) -> Any:
    """The model in Transformers, of the class that made it."""
    import torch
    import transformers
    from safetensors.torch import load_file

    kind = getattr(transformers, TINY[name].auto)
    model = kind.from_pretrained(path, dtype=getattr(torch, TINY[name].dtype)).eval()
    if name in REWARDS:
        score = torch.nn.Sequential(
            torch.nn.Linear(128, 128), torch.nn.ReLU(), torch.nn.Linear(128, REWARDS[name])
        )
        weights = load_file(path / "model.safetensors")
        score.load_state_dict({n[6:]: w for n, w in weights.items() if n.startswith("score.")})
        model.lm_head = score
    return model


def oracle_pooled(name: str, model: Any, prompt: Sequence[int]) -> list[float]:
    """A unit vector, or probabilities, or scores; those of every token one after the other."""
    import torch

    with torch.no_grad():
        ids = torch.tensor([prompt])
        if pool(name) == "embed":
            states = model.base_model(ids).last_hidden_state[0, 0 if name in CLS else -1]
            return torch.nn.functional.normalize(states.float(), dim=-1).tolist()
        answers = model(ids).logits[0].float()
        if name == "qwen2_process_reward":
            answers = answers[ids[0] == STEP]
        if name not in SCORES:
            answers = answers.softmax(-1)
        return answers.flatten().tolist()
