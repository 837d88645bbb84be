"""A model whose own weights learned, as a folder that stands alone.

What learned is rounded once to the base's format; all else (frozen tensors, configuration,
tokenizer, licence) is the base's, byte for byte where nothing has to change.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from tuneyard.runners.adapter import trained_parameters
from tuneyard.runners.failures import LossNotFinite
from tuneyard.runners.merge_plan import EMBEDDING, HEAD, Part, is_tied
from tuneyard.runners.merged_folder import Change, write_surroundings
from tuneyard.runners.merging import BLOCK_BYTES, Merger, torch_dtype
from tuneyard.runners.shards import save_weights, write_weights
from tuneyard.runners.tensor_files import weights_of

MOST_BYTES = 5 * 10**9
"""Size of a file of weights at most: LLaMA-Factory's export_size."""


def write_tuned(
    model: Any, base: Path, folder: Path, *, config: Mapping[str, Any], origin: Mapping[str, Any]
) -> None:
    """Write the whole folder but for tuneyard.json and the log."""
    learned, weights = dict(trained_parameters(model)), weights_of(base)
    if HEAD in weights and EMBEDDING in learned and is_tied(config, weights):
        learned[HEAD] = learned[EMBEDDING]  # the disk holds it twice
    if all(n in weights and weights[n].shape == tuple(p.shape) for n, p in learned.items()):
        parts = [Part(name, tensor, tensor.dtype) for name, tensor in weights.items()]
        with closing(Merger()) as copier:

            def blocks(part: Part) -> Iterator[memoryview]:
                if part.name in learned:
                    return _rounded(part, learned[part.name])
                return copier.blocks(part)

            write_weights(folder, parts, blocks, most_bytes=MOST_BYTES, progress=lambda _done: None)
    else:
        # A family whose modules are named otherwise than the tensors on disk.
        save_weights(model.to(_format(config, weights)), folder, most_bytes=MOST_BYTES)
    write_surroundings(base, folder, Change(None, False, origin))


def _rounded(part: Part, parameter: torch.Tensor) -> Iterator[memoryview]:
    """The part's bytes in the base's format, some rows at a time."""
    rows = parameter.detach().reshape(len(parameter), -1)
    most = max(1, BLOCK_BYTES // (4 * rows.shape[1]))
    for first in range(0, len(rows), most):
        values = rows[first : first + most].to("cpu", torch_dtype(part.dtype)).contiguous()
        if not torch.isfinite(values).all():
            raise LossNotFinite(f"{part.name[:80]!r} holds values that are no numbers.")
        yield values.view(-1).view(torch.uint8).numpy().data


def _format(config: Mapping[str, Any], weights: Mapping[str, Any]) -> torch.dtype:
    said = config.get("dtype") or config.get("torch_dtype")
    if isinstance(said, str):
        found: torch.dtype = getattr(torch, said)
        return found
    return torch_dtype(next(iter(weights.values())).dtype)
