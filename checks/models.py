"""What a model folder says about itself: config.json and the headers of its safetensors."""

import json
import os
import re
import stat
import struct
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from tuneyard.specs.errors import InputError

MAX_HEADER_BYTES = 100 * 1024**2
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
    "U16": 2, "U32": 4, "U64": 8, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip

_LINEAR = re.compile(r"\.layers\.\d+\..*?([a-z0-9_]+)\.weight$")


def model_facts(folder: Path) -> dict[str, Any]:
    """linear_modules, max_position_embeddings, layers, has_chat_template, parameters.

    Raises: InputError remote_code_forbidden, unsafe_format, bad_safetensors, not_a_regular_file.
    """
    config = _read_json(folder / "config.json")
    refuse_code(config)
    tensors: dict[str, Mapping[str, Any]] = {}
    for path in sorted(folder.iterdir()):
        _check_regular(path)
        if path.suffix == ".safetensors":
            tensors |= read_header(path)
    linear = {m.group(1) for name, t in tensors.items() if len(t["shape"]) == 2
              and (m := _LINEAR.search(name))}  # fmt: skip
    return {
        "linear_modules": sorted(linear),
        "layers": int(config.get("num_hidden_layers") or 0),
        "max_position_embeddings": config.get("max_position_embeddings"),
        "has_chat_template": _has_template(folder),
        "parameters": sum(_count(t["shape"]) for t in tensors.values()),
    }


def refuse_code(config: Any) -> None:
    """Refuse a configuration that would run code of its own, however deep it stands."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            if name == "auto_map" or (name.startswith("_") and "implementation" in name):
                message = f"config.json asks for code of its own ({name})."
                raise InputError(message, code="remote_code_forbidden", field=name)
            refuse_code(value)
    elif isinstance(config, list):
        for value in config:
            refuse_code(value)


def read_header(path: Path) -> dict[str, Mapping[str, Any]]:
    """Name -> {dtype, shape, data_offsets} of a safetensors file, every claim checked.

    Source: the format's description at huggingface/safetensors, docs/source/index.mdx.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
            raise _bad(path, "its header's length is impossible")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise _bad(path, f"its header is no JSON: {error}") from None
    header.pop("__metadata__", None)
    _check_layout(path, header, size - 8 - length)
    return dict(header)


def _check_layout(path: Path, header: Mapping[str, Any], data_bytes: int) -> None:
    spans = []
    for name, tensor in header.items():
        try:
            width = DTYPE_BYTES[tensor["dtype"]]
            begin, end = tensor["data_offsets"]
            expected = width * _count(tensor["shape"])
        except (KeyError, TypeError, ValueError):
            raise _bad(path, f"tensor {name[:80]!r} is not described as one") from None
        if end - begin != expected or begin < 0 or end > data_bytes:
            raise _bad(path, f"tensor {name[:80]!r} does not lie within the file")
        spans.append((begin, end, name))
    spans.sort()
    for (_, end, _), (begin, _, name) in pairwise(spans):
        if begin < end:
            raise _bad(path, f"tensor {name[:80]!r} overlaps another")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is given twice")
    return found


def _count(shape: list[int]) -> int:
    total = 1
    for size in shape:
        if not isinstance(size, int) or size < 0:
            raise ValueError("a size is no number")
        total *= size
    return total


def _bad(path: Path, reason: str) -> InputError:
    return InputError(f"{path.name} cannot be used: {reason}.", code="bad_safetensors")


def _check_regular(path: Path) -> None:
    if not stat.S_ISREG(os.lstat(path).st_mode):
        message = f"{path.name} is not a regular file."
        raise InputError(message, code="not_a_regular_file")
    with path.open("rb") as file:
        head = file.read(4)
    pickled = head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))
    zipped = head == b"PK\x03\x04" and path.suffix in (".bin", ".pt", ".pth", ".safetensors")
    if pickled or zipped:
        message = f"{path.name} holds a Python pickle, which may run code."
        raise InputError(message, code="unsafe_format", hint="save the weights as safetensors")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError("The folder has no config.json.", code="missing_config") from None
    except (ValueError, RecursionError):
        raise InputError("config.json is no JSON.", code="bad_config") from None
    return value if isinstance(value, dict) else {}


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists():
        return True
    config = folder / "tokenizer_config.json"
    return config.exists() and bool(_read_json(config).get("chat_template"))
