"""A GGUF file as a folder that transformers 4 and 5 read alike.

Knows Llama's tensors and byte-level BPE tokenizers whose pre-tokenizer is in the table here; any
other file is refused rather than guessed at. The same file gives the same bytes.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tuneyard.runners.failures import BadSpec

PRE_TOKENIZERS: Mapping[str, Callable[[], Any]] = {
    # llama.cpp's "smollm": single digits, then GPT-2's words. It is what the model's own
    # tokenizer.json says; transformers' GGUF reader leaves the digits together.
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
}

CONTROL = 3
"""gguf.TokenType.CONTROL: a token that is not text."""

_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}

Fields = Mapping[str, Any]


def convert(file: Path, folder: Path, *, progress: Callable[[int, int], None]) -> None:
    """Write a GGUF's model into a folder: bf16 weights, configuration, tokenizer, template.

    progress: tensors done, of how many. Raises: BadSpec for a file of another kind.
    """
    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise BadSpec(f"GGUF files of {fields['general.architecture']!r} are not read yet.")
    tensors = {}
    for done, (name, weights) in enumerate(_weights(reader, fields)):
        tensors[name] = weights
        progress(done, len(reader.tensors))
    config = _config(fields, tied="lm_head.weight" not in tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _generation_config(config))
    _write_tokenizer(fields, folder)
    (folder / "model.safetensors").chmod(0o644)


def _weights(reader: GGUFReader, fields: Fields) -> Iterator[tuple[str, torch.Tensor]]:
    heads = fields["llama.attention.head_count"]
    kv_heads = fields.get("llama.attention.head_count_kv", heads)
    for tensor in reader.tensors:
        name = _name(tensor.name)
        values = dequantize(tensor.data, tensor.tensor_type)
        if name.endswith("q_proj.weight"):
            values = _unpermute(values, heads)
        elif name.endswith("k_proj.weight"):
            values = _unpermute(values, kv_heads)
        yield name, torch.from_numpy(np.array(values)).to(torch.bfloat16)


def _name(name: str) -> str:
    """A tensor's name in transformers' Llama. Raises: BadSpec for one that it does not have.

    >>> _name("blk.3.attn_q.weight"), _name("token_embd.weight")
    ('model.layers.3.self_attn.q_proj.weight', 'model.embed_tokens.weight')
    """
    parts = name.split(".")
    if parts[0] == "blk" and parts[-1] == "weight" and parts[2] in _LAYER:
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.weight"
    if len(parts) == 2 and parts[1] == "weight" and parts[0] in _OUTSIDE:
        return f"{_OUTSIDE[parts[0]]}.weight"
    raise BadSpec(f"The GGUF file has a tensor that Llama has not: {name}.")


def _unpermute(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows back from interleaved pairs to halves, as transformers rotates them.

    Source: the inverse of permute in llama.cpp's convert_hf_to_gguf.py.
    """
    rows, columns = weights.shape
    pairs = weights.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _config(fields: Fields, *, tied: bool) -> dict[str, Any]:
    hidden, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    rope_theta = float(fields.get("llama.rope.freq_base", 10000.0))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": fields.get("llama.attention.key_length", hidden // heads),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "initializer_range": 0.02,
        "max_position_embeddings": fields["llama.context_length"],
        # transformers 4 reads the first of each pair, transformers 5 the second.
        "rope_theta": rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": tied,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "use_cache": True,
    }


def _generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _write_tokenizer(fields: Fields, folder: Path) -> None:
    words = fields["tokenizer.ggml.tokens"]
    kinds = fields["tokenizer.ggml.token_type"]
    special = [word for word, kind in zip(words, kinds, strict=True) if kind == CONTROL]
    _tokenizer(fields, words, special).save(str(folder / "tokenizer.json"))
    ids = {
        "bos_token": fields["tokenizer.ggml.bos_token_id"],
        "eos_token": fields["tokenizer.ggml.eos_token_id"],
        "unk_token": fields.get("tokenizer.ggml.unknown_token_id"),
        "pad_token": fields.get("tokenizer.ggml.padding_token_id"),
    }
    template = fields["tokenizer.chat_template"]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": special,
        "chat_template": template,  # for transformers before 4.43, which know no .jinja
        **{name: words[i] for name, i in ids.items() if i is not None},
    }
    _write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _tokenizer(fields: Fields, words: list[str], special: list[str]) -> Tokenizer:
    pre = fields.get("tokenizer.ggml.pre", "")
    if fields["tokenizer.ggml.model"] != "gpt2" or pre not in PRE_TOKENIZERS:
        raise BadSpec(f"The GGUF file's tokenizer ({pre!r}) is not one that we know.")
    merges = [tuple(pair.split(" ", 1)) for pair in fields["tokenizer.ggml.merges"]]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(w, special=True, normalized=False) for w in special])
    return tokenizer


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
