"""Safetensors by offset: where each tensor lies, and how a file of them is laid out.

Tensors are described here and read elsewhere, piece by piece: nothing is mapped, since mapped pages
count as memory of the process.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneyard.runners.failures import BadData, InputGone
from tuneyard.specs.errors import InputError
from tuneyard.store.safetensors import DTYPE_BITS, product, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Safetensors' name of a format -> torch's, for those that are computed with."""

FORMATS = {name: tag for tag, name in FLOATS.items()}
"""The other way round."""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: ``start`` is its first byte within the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return DTYPE_BITS[self.dtype] * product(list(self.shape)) // 8


def tensors_in(path: Path, *, field: str) -> dict[str, Tensor]:
    """Name -> tensor of one file, in the order in which they lie. Raises: BadData, InputGone."""
    try:
        header = read_header(path)
        with path.open("rb") as file:
            start = 8 + int(struct.unpack("<Q", file.read(8))[0])
    except FileNotFoundError:
        raise InputGone(f"{path.name} is missing.", field=field) from None
    except InputError as error:
        raise BadData(error.message, field=field, hint=error.hint) from None
    found = [
        Tensor(
            name, each["dtype"], tuple(each["shape"]), path, start + int(each["data_offsets"][0])
        )
        for name, each in header.items()
    ]
    return {tensor.name: tensor for tensor in sorted(found, key=lambda each: each.start)}


def weights_of(folder: Path) -> dict[str, Tensor]:
    """All tensors that a model's folder loads: its one file, or what its index lists.

    Raises: BadData, InputGone.
    """
    if (folder / SINGLE_FILE).is_file() or not (folder / INDEX_FILE).is_file():
        return tensors_in(folder / SINGLE_FILE, field="model")
    places = _weight_map(folder / INDEX_FILE)
    found: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        listed = tensors_in(folder / name, field="model")
        found |= {each: tensor for each, tensor in listed.items() if places.get(each) == name}
    missing = sorted(places.keys() - found.keys())
    if missing:
        message = f"{len(missing)} tensors of {INDEX_FILE} are missing, such as {missing[0][:80]!r}"
        raise BadData(f"{message}.", field="model", hint="download the model again")
    return found


def _weight_map(path: Path) -> Mapping[str, str]:
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        plain = all(Path(name).name == name for name in places.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        plain = False
    if not plain:
        raise BadData(f"{path.name} is not readable.", field="model")
    found: Mapping[str, str] = places
    return found


def header_bytes(entries: Sequence[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """A file's beginning, for tensors (name, dtype, shape, bytes) that follow in this order.

    Source of the form: the format's description at huggingface/safetensors; padded to 8 bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, size in entries:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
