"""Bases small enough to train in a test: a random Llama of two layers that speaks in bytes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
WORDS = {
    CHATML: ["<|unknown|>", "<|im_start|>", "<|im_end|>"],
    LLAMA: ["<|begin|>", "<|text_end|>", "<|start|>", "<|end|>", "<|eot|>"],
}


def a_tiny_base(
    folder: Path,
    *,
    template: str | None = CHATML,
    hidden: int = 32,
    dtype: str = "float32",
    **shape: Any,
) -> Path:
    """Write a base of random weights: with CHATML pad is eos, with LLAMA the tokenizer adds bos.

    shape: more of LlamaConfig, such as tie_word_embeddings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(folder, template)
    torch.manual_seed(7)
    config = LlamaConfig(
        **{
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": size,
            "max_position_embeddings": 512,
            "initializer_range": 0.15,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1 if template == LLAMA else 2,
        }
        | shape
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, template: str | None = CHATML) -> int:
    """Write a tokenizer that speaks in bytes; returns the size of its vocabulary."""
    words = WORDS[template or CHATML]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate([*words, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(w, special=True, normalized=False) for w in words])
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if words is WORDS[LLAMA]:
        # As Llama-3's: tokenizing adds bos, and so does the template.
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{words[0]} $A", special_tokens=[(words[0], 0)]
        )
        config |= {"bos_token": words[0], "eos_token": words[1]}
    else:
        config |= {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    if template is not None:
        config["chat_template"] = template
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(vocabulary)


ANIMALS = ["cat", "dog", "heron", "ox", "gnu", "tapir", "eel", "wolf"]
ROWS = [
    {"instruction": f"What does a {a} say?", "output": f"{a[::-1]}!" * (1 + i % 3)}
    for i, a in enumerate(ANIMALS)
]
"""Eight rows whose answers differ, also in length."""

PAIRS = [
    {"instruction": f"What does a {a} say?", "chosen": f"{a[::-1]}!", "rejected": f"a {a} says no"}
    for a in ANIMALS
]
"""Eight pairs of answers, of which one is wanted."""


def a_dataset(path: Path, rows: Sequence[Mapping[str, Any]] = ROWS) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
