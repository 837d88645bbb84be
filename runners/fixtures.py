"""Models that are made rather than brought, for trying everything where there is no hub.

    python -P -m tuneyard.runners.fixtures tiny-llama FOLDER [--hidden 64] [--layers 4] [--heads 4]

The weights are random and the same for the same arguments; the tokenizer speaks in bytes.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from tuneyard.runners.layouts import LAYOUTS, jinja

WORDS = ["<|unknown|>", "<|im_start|>", "<|im_end|>"]
SEED = 7


def main(argv: Sequence[str]) -> int:
    """Write what was asked for."""
    parser = argparse.ArgumentParser(prog="tuneyard fixtures")
    parser.add_argument("what", choices=["tiny-llama"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    asked = parser.parse_args(argv)
    if asked.heads < 2 or asked.heads % 2:
        parser.error("heads must be a multiple of 2")
    if asked.hidden % (2 * asked.heads) or asked.hidden <= 0 or asked.layers <= 0:
        parser.error(f"hidden must be a multiple of {2 * asked.heads}, layers at least 1")
    write_tiny_llama(asked.folder, hidden=asked.hidden, layers=asked.layers, heads=asked.heads)
    return 0


def write_tiny_llama(folder: Path, *, hidden: int = 64, layers: int = 4, heads: int = 4) -> None:
    """Write a Llama of random bf16 weights with a ChatML template into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        vocab_size=len(WORDS) + len(alphabet),
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=2,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(folder)
    _write_tokenizer(folder, alphabet)


def _write_tokenizer(folder: Path, alphabet: Sequence[str]) -> None:
    vocabulary = {word: i for i, word in enumerate([*WORDS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(w, special=True, normalized=False) for w in WORDS])
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "model_max_length": 4096,
        "chat_template": jinja(LAYOUTS["chatml"]),
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    text = json.dumps(config, indent=2)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
