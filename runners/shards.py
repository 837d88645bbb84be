"""A model's weights as files of a limited size, with the index that loaders read."""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tuneyard.runners.merge_plan import Part
from tuneyard.runners.tensor_files import INDEX_FILE, SINGLE_FILE, header_bytes

Progress = Callable[[int], None]


def write_weights(
    folder: Path,
    parts: Sequence[Part],
    blocks: Callable[[Part], Iterable[memoryview]],
    *,
    most_bytes: float,
    progress: Progress,
) -> None:
    """Write parts in their order into as many files as it takes. progress: parts done."""
    shards = sharded(parts, most_bytes)
    done, places = 0, {}
    for number, shard in enumerate(shards, start=1):
        name = _name(number, len(shards))
        entries = [(part.name, part.dtype, part.source.shape, part.bytes) for part in shard]
        with (folder / name).open("wb") as file:
            file.write(header_bytes(entries))
            for part in shard:
                for block in blocks(part):
                    file.write(block)
                places[part.name] = name
                done += 1
                progress(done)
    if len(shards) > 1:
        size = sum(part.bytes for part in parts)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save_weights(model: Any, folder: Path, *, most_bytes: float) -> None:
    """The same of a model in memory, as transformers names and divides its tensors."""
    aside = folder / ".saved"
    model.save_pretrained(aside, max_shard_size=f"{max(1, int(most_bytes // 1000))}KB")
    for path in aside.iterdir():
        if path.suffix == ".safetensors" or path.name == INDEX_FILE:
            path.rename(folder / path.name)
            (folder / path.name).chmod(0o644)
    shutil.rmtree(aside)


def sharded(parts: Sequence[Part], most_bytes: float) -> list[list[Part]]:
    """Parts in their order, split before each that would not fit; a larger one stands alone."""
    shards: list[list[Part]] = [[]]
    size = 0
    for part in parts:
        if shards[-1] and size + part.bytes > most_bytes:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += part.bytes
    return shards


def _name(number: int, count: int) -> str:
    return SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
