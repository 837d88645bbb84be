"""What the stub hubs have: a model with all that comes along, and rows."""

import hashlib
import json
import struct

REPO = "team/tiny-llama"
WEIGHTS = "model.safetensors"
SIZE = 600_000


def weights(size: int = SIZE, *, seed: int = 0) -> bytes:
    """A safetensors file of one tensor."""
    shape = [size // 4]
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, size // 4 * 4]}
    header = json.dumps({"model.embed_tokens.weight": tensor}).encode()
    header += b" " * (-len(header) % 8)
    body = hashlib.shake_128(bytes([seed])).digest(size // 4 * 4)
    return struct.pack("<Q", len(header)) + header + body


CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1}


def a_model(**files: bytes) -> dict[str, bytes]:
    """What a hub lists of a model, with much that transformers does not need."""
    return {
        ".gitattributes": b"* text",
        "README.md": b"# tiny",
        "LICENSE": b"free",
        "config.json": json.dumps(CONFIG).encode(),
        "generation_config.json": b"{}",
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        WEIGHTS: weights(),
        "pytorch_model.bin": b"\x80\x02pickle",
        "tiny-q4.gguf": b"GGUF",
        "onnx/model.onnx": b"onnx",
        "original/consolidated.00.pth": b"PK",
        **files,
    }


WANTED = {
    "LICENSE", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    WEIGHTS,
}  # fmt: skip

ALPACA = b'[{"instruction": "hi", "output": "there"}]'
