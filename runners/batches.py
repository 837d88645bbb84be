"""Which examples a step holds, and how they become tensors.

The order depends on the seed and the number of examples consumed, on nothing else: not on the batch
size, the number of devices or where a run was interrupted.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, overload

import torch

from tuneyard.runners.examples import IGNORED, Drawn, Item, Labelled, sequences_of
from tuneyard.runners.failures import BadData
from tuneyard.runners.seeds import stream_seed

Kept = TypeVar("Kept")


@dataclass(frozen=True)
class Order:
    """The order of ``count`` examples, epoch after epoch."""

    count: int
    seed: int
    shuffled: bool = True

    def take(self, consumed: int, count: int) -> list[int]:
        """Indices of the next ``count`` examples, fewer where the epoch ends before."""
        epoch, start = divmod(consumed, self.count)
        return self._epoch(epoch)[start : start + count]

    def _epoch(self, epoch: int) -> list[int]:
        indices = list(range(self.count))
        if self.shuffled:
            random.Random(stream_seed(self.seed, "order", epoch)).shuffle(indices)  # noqa: S311
        return indices


def steps_of(count: int, *, rows_per_step: int, epochs: float, max_steps: int) -> tuple[int, int]:
    """Steps of an epoch and of the run. The last, short step of an epoch is kept.

    >>> steps_of(10, rows_per_step=4, epochs=1.5, max_steps=-1)
    (3, 5)
    """
    each = math.ceil(count / rows_per_step)
    return each, max_steps if max_steps > 0 else math.ceil(epochs * each)


class Chosen(Sequence[Kept]):
    """Some items of a sequence, which stay where they are."""

    def __init__(self, items: Sequence[Kept], indices: Sequence[int]) -> None:
        self._items, self._indices = items, indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Kept: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Kept]: ...
    def __getitem__(self, index: int | slice) -> Kept | Sequence[Kept]:
        if isinstance(index, slice):
            return [self._items[i] for i in self._indices[index]]
        return self._items[self._indices[index]]


def split(
    items: Sequence[Kept], val_size: float, *, seed: int
) -> tuple[Sequence[Kept], Sequence[Kept]]:
    """Divide into training and validation; val_size is a count, or below 1 a share.

    Raises: BadData when one side would be empty.
    """
    if val_size == 0:
        return items, []
    held = int(val_size) if val_size >= 1 else int(len(items) * val_size)
    if not 0 < held < len(items):
        raise BadData(
            f"val_size {val_size:g} of {len(items)} rows leaves nothing to "
            f"{'validate on' if held == 0 else 'train on'}.",
            field="val_size",
        )
    indices = list(range(len(items)))
    random.Random(stream_seed(seed, "validation")).shuffle(indices)  # noqa: S311
    chosen = sorted(indices[:held])
    kept = sorted(indices[held:])
    return Chosen(items, kept), Chosen(items, chosen)


@dataclass(frozen=True)
class Batch:
    """A group of items, padded at the right.

    Of items of two sequences all first ones come before all second ones.
    ids: [sequences, length]; positions: [p], the ones that predict a target in any sequence;
    targets: [sequences, p], IGNORED where this sequence has none; lengths: [sequences], without
    padding; wanted: [items] of labelled answers, else [0]; advantages: [items] of drawn ones, else
    [0].
    """

    ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    lengths: torch.Tensor
    tokens: int
    wanted: torch.Tensor
    advantages: torch.Tensor

    def to(self, device: str) -> "Batch":
        """The same on a device."""
        if device == "cpu":
            return self
        moved: dict[str, Any] = {
            each.name: value.to(device)
            for each in fields(self)
            if isinstance(value := getattr(self, each.name), torch.Tensor)
        }
        return replace(self, **moved)

    def halves(self) -> tuple["Batch", "Batch"]:
        """All first sequences, and all second ones."""
        pairs = zip(self.ids.chunk(2), self.targets.chunk(2), self.lengths.chunk(2), strict=True)
        first, second = (
            replace(self, ids=ids, targets=targets, lengths=lengths)
            for ids, targets, lengths in pairs
        )
        return first, second


def collate(items: Sequence[Item], pad_id: int) -> Batch:
    """Pad sequences to the longest. Nothing attends to padding: it stands right, masks are causal.

    Logits are wanted only where something is learned, hence ``positions``.
    """
    columns = zip(*map(sequences_of, items), strict=True)
    examples = [example for column in columns for example in column]
    width = max(len(e.ids) for e in examples)
    ids = torch.tensor([e.ids + [pad_id] * (width - len(e.ids)) for e in examples])
    labels = torch.tensor([e.labels + [IGNORED] * (width - len(e.ids)) for e in examples])
    following = labels[:, 1:]
    positions = (following != IGNORED).any(0).nonzero().flatten()
    if not len(positions):
        positions = torch.zeros(1, dtype=torch.long)
    if width == 1:
        following = torch.full_like(labels, IGNORED)
    lengths = torch.tensor([len(e.ids) for e in examples])
    wanted = [item.wanted for item in items if isinstance(item, Labelled)]
    advantages = [item.advantage for item in items if isinstance(item, Drawn)]
    return Batch(
        ids,
        positions,
        following[:, positions],
        lengths,
        int(lengths.sum()),
        torch.tensor(wanted, dtype=torch.bool),
        torch.tensor(advantages, dtype=torch.float32),
    )
