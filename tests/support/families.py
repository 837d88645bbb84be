"""Tiny random bases of the families that tuning is shown on; where there is a window, it is 8."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from support.tiny_models import write_tokenizer

WINDOW = 8
LAYERS = 2

_COMMON: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_EXPERTS = {"num_experts_per_tok": 2}
_ONE_OF_EACH = ["sliding_attention", "full_attention"]

FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": WINDOW,
            "layer_types": _ONE_OF_EACH,
            "attn_logit_softcapping": 2.0,  # small enough to be felt
            "final_logit_softcapping": 30.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": WINDOW,
            "layer_types": _ONE_OF_EACH,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": ("Phi3", {"sliding_window": WINDOW}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": None, **_EXPERTS}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 32, **_EXPERTS},
    ),
    "glm4": ("Glm4", {"head_dim": 8}),
    "granite": (
        "Granite",
        {"attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    ),
    "gemma": ("Gemma", {"head_dim": 8, "tie_word_embeddings": True}),
    "glm": ("Glm", {"head_dim": 8}),
    "gpt_oss": (
        "GptOss",
        {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": _ONE_OF_EACH,
            "num_local_experts": 4,
            **_EXPERTS,
        },
    ),
    "olmo2": ("Olmo2", {}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_experts": 4,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            **_EXPERTS,
        },
    ),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
}
"""Name -> the stem of transformers' classes, and what its configuration says beside the common."""


def a_family_base(folder: Path, family: str, **shape: Any) -> Path:
    """Write a base of a family: random fp32 weights, a tokenizer that speaks in bytes."""
    stem, own = FAMILIES[family]
    config_class = getattr(transformers, _CONFIGS.get(family, f"{stem}Config"))
    folder.mkdir(parents=True, exist_ok=True)
    config = config_class(**_COMMON | own | {"vocab_size": write_tokenizer(folder)} | shape)
    torch.manual_seed(7)
    model = getattr(transformers, f"{stem}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and float(parameter.abs().max()) == 0:
                torch.nn.init.normal_(parameter, std=0.15)  # experts begin empty elsewhere
    model.save_pretrained(folder)
    return folder


_CONFIGS = {"gemma3": "Gemma3TextConfig"}
