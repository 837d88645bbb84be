"""The header of a safetensors file, read by hand and every claim checked.

Source: the format's description at huggingface/safetensors, docs/source/index.mdx.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuneyard.specs.errors import InputError

MAX_HEADER_BYTES = 100 * 1024**2
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8,
    "U16": 16, "U32": 32, "U64": 64, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


def read_header(path: Path) -> dict[str, Mapping[str, Any]]:
    """Name -> {dtype, shape, data_offsets}. Raises: InputError bad_safetensors, with the tensor."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= size - 8:
            raise _bad(path, "its header would be longer than the file")
        if length > MAX_HEADER_BYTES:
            raise _bad(path, f"its header is larger than {MAX_HEADER_BYTES // 1024**2} MiB")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"its header cannot be read: {str(error)[:120]}") from None
    if not isinstance(header, dict):
        raise _bad(path, "its header is no object")
    header.pop("__metadata__", None)
    _check_layout(path, header, size - 8 - length)
    return header


def product(shape: list[int]) -> int:
    """The number of elements."""
    total = 1
    for size in shape:
        total *= size
    return total


def _check_layout(path: Path, header: Mapping[str, Any], data_bytes: int) -> None:
    """The tensors follow each other without holes, from the header's end to the file's."""
    spans = sorted((*_span(path, name, tensor), name) for name, tensor in header.items())
    expected = 0
    for begin, end, name in spans:
        if begin != expected:
            how = "overlaps another" if begin < expected else "follows a hole"
            raise _bad(path, f"tensor {name[:80]!r} {how}")
        if end > data_bytes:
            raise _bad(path, f"tensor {name[:80]!r} ends beyond the file: was it cut off?")
        expected = end
    if expected != data_bytes:
        raise _bad(path, f"{data_bytes - expected} bytes after its last tensor belong to none")


def _span(path: Path, name: str, tensor: Any) -> tuple[int, int]:
    shown = f"tensor {name[:80]!r}"
    if not isinstance(tensor, dict) or not {"dtype", "shape", "data_offsets"} <= tensor.keys():
        raise _bad(path, f"{shown} is not described as one")
    if not isinstance(tensor["dtype"], str) or tensor["dtype"] not in DTYPE_BITS:
        raise _bad(path, f"{shown} is of the unknown type {str(tensor['dtype'])[:40]!r}")
    if not _are_sizes(tensor["shape"]) or not _are_sizes(tensor["data_offsets"]):
        raise _bad(path, f"{shown} has a shape or place that is none")
    bits = DTYPE_BITS[tensor["dtype"]] * product(tensor["shape"])
    if len(tensor["data_offsets"]) != 2 or bits % 8:
        raise _bad(path, f"{shown} has a shape or place that is none")
    begin, end = tensor["data_offsets"]
    if end - begin != bits // 8:
        raise _bad(path, f"{shown} needs {bits // 8} bytes and has {end - begin}")
    return begin, end


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(each) is int and 0 <= each < 2**63 for each in value
    )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:80]!r} is given twice")
        found[name] = value
    return found


def _bad(path: Path, reason: str) -> InputError:
    hint = "download or save the file again"
    return InputError(f"{path.name} cannot be used: {reason}.", code="bad_safetensors", hint=hint)
