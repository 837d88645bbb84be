"""The arithmetic of merging: W + scale * (B @ A), rounded once, in blocks of rows.

A block is read into a buffer, summed in another, handed out and forgotten; so the memory needed is
a few buffers and one pair of factors, however large the model is.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tuneyard.runners.failures import BadData
from tuneyard.runners.merge_plan import Pair, Part
from tuneyard.runners.tensor_files import FLOATS, Tensor

BLOCK_BYTES = 32 * 1024**2
"""Size of a block in fp32. Three buffers of it exist at most."""

MIN_ROWS = 64
"""Fewer rows may be multiplied by another kernel, whose sums differ in their last bit."""


def make_exact() -> None:
    """Sums in whole fp32: neither TF32 on a GPU nor bf16 on a CPU in their place."""
    torch.set_float32_matmul_precision("highest")


@dataclass
class Merger:
    """Hands out the bytes of parts, one block after the other. ``applied`` counts the pairs."""

    device: str = "cpu"
    block_bytes: int = BLOCK_BYTES
    applied: int = 0
    _files: dict[Path, int] = field(default_factory=dict)
    _buffers: dict[str, torch.Tensor] = field(default_factory=dict)

    def blocks(self, part: Part) -> Iterator[memoryview]:
        """The part's bytes; each view is good until the next one is asked for. Raises: BadData."""
        if part.pair is not None:
            yield from self._summed(part, part.pair)
            self.applied += 1
        elif part.dtype == part.source.dtype:
            yield from self._copied(part.source)
        else:
            yield from self._converted(part)

    def close(self) -> None:
        """Close all files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _copied(self, source: Tensor) -> Iterator[memoryview]:
        for first in range(0, source.bytes, self.block_bytes):
            size = min(self.block_bytes, source.bytes - first)
            yield _bytes(self._read(source, first, size))

    def _converted(self, part: Part) -> Iterator[memoryview]:
        width = torch_dtype(part.source.dtype).itemsize
        for first in range(0, part.source.bytes, self.block_bytes):
            size = min(self.block_bytes, part.source.bytes - first)
            values = self._read(part.source, first, size).view(torch_dtype(part.source.dtype))
            yield _bytes(self._buffer("out", part.dtype, size // width).copy_(values))

    def _summed(self, part: Part, pair: Pair) -> Iterator[memoryview]:
        rows, columns = part.source.shape
        row_bytes = part.source.bytes // max(rows, 1)
        a, b = self._factor(pair.a), self._factor(pair.b)
        for first, last in even_blocks(rows, max(MIN_ROWS, self.block_bytes // (4 * columns))):
            size = (last - first) * columns
            read = self._read(part.source, first * row_bytes, (last - first) * row_bytes)
            base = read.view(torch_dtype(part.source.dtype)).view(last - first, columns)
            total = self._buffer("sum", "F32", size, self.device)
            if pair.embedding:
                delta = total.view(columns, last - first)
                torch.matmul(b, a[:, first:last], out=delta)
                delta = delta.T
            else:
                delta = total.view(last - first, columns)
                torch.matmul(b[first:last], a, out=delta)
            delta.mul_(pair.scale).add_(base.to(self.device))
            out = self._buffer("out", part.dtype, size).view(last - first, columns).copy_(delta)
            if not torch.isfinite(out).all():
                raise _not_finite(part)
            yield _bytes(out)

    def _factor(self, tensor: Tensor) -> torch.Tensor:
        values = self._read(tensor, 0, tensor.bytes, buffer="factor")
        shaped = values.view(torch_dtype(tensor.dtype)).view(tensor.shape)
        return shaped.to(self.device, torch.float32, copy=True)

    def _buffer(self, name: str, dtype: str, count: int, device: str = "cpu") -> torch.Tensor:
        """Room for ``count`` values, the same bytes each time."""
        size = count * torch_dtype(dtype).itemsize
        held = self._buffers.get(name)
        if held is None or held.numel() < size:
            self._buffers[name] = held = torch.empty(size, dtype=torch.uint8, device=device)
        return held[:size].view(torch_dtype(dtype))

    def _read(self, tensor: Tensor, first: int, size: int, buffer: str = "in") -> torch.Tensor:
        """Bytes of a tensor from ``first`` on. Raises: BadData when the file has become shorter."""
        room = self._buffer(buffer, "U8", size)
        view = room.numpy().data
        done = 0
        while done < size:
            read = os.preadv(self._file(tensor.path), [view[done:]], tensor.start + first + done)
            if not read:
                raise BadData(f"{tensor.path.name} was cut off while it was read.", field="model")
            done += read
        return room

    def _file(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[path]


def even_blocks(rows: int, most: int) -> Iterator[tuple[int, int]]:
    """Parts of at most so many rows, all alike but for one: a small rest would be summed otherwise.

    >>> list(even_blocks(10, 4))
    [(0, 3), (3, 6), (6, 10)]
    """
    count = -(-rows // most)
    for i in range(count):
        yield rows * i // count, rows * (i + 1) // count


def torch_dtype(tag: str) -> torch.dtype:
    """Safetensors' name of a format -> torch's."""
    found: torch.dtype = getattr(torch, FLOATS.get(tag, "uint8"))
    return found


def _bytes(values: torch.Tensor) -> memoryview:
    return values.contiguous().view(-1).view(torch.uint8).numpy().data


def _not_finite(part: Part) -> BadData:
    message = f"{part.name[:80]!r} would hold values that are no numbers in {FLOATS[part.dtype]}."
    hint = "is the adapter broken? float16 ends at 65,504: dtype bfloat16 or float32 go further"
    return BadData(message, field="adapter", hint=hint)
