"""Which examples a step holds, and how they become tensors.

The order depends on the seed and the number of examples consumed, on nothing else: not on the batch
size, the number of devices or where a run was interrupted.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import chain
from typing import Any, TypeVar, overload

import torch

from tuneyard.runners.examples import IGNORED, Drawn, Example, Item, Labelled, Pack, sequences_of
from tuneyard.runners.failures import BadData
from tuneyard.runners.reading import Reading, reading
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
        indices = _shuffled(self.count, self.seed, epoch) if self.shuffled else range(self.count)
        return list(indices[start : start + count])


@lru_cache(maxsize=1)  # a second and more for a million examples, and every step asks
def _shuffled(count: int, seed: int, epoch: int) -> list[int]:
    indices = list(range(count))
    random.Random(stream_seed(seed, "order", epoch)).shuffle(indices)  # noqa: S311
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


Sequenced = tuple[Example, ...]
"""Examples that stand in one sequence, where each sees those before it: nearly always one."""


@dataclass(frozen=True)
class Batch:
    """A group of items as a model reads them: a padded row for each sequence, or all in one row.

    Of items of two sequences all first ones come before all second ones.
    sequences: what stands here; sizes: how long each is in the one row, None where each has a row.
    ids, places, spans: [rows, time], a token's id, where it is in its example, how long that is.
    positions: [p], where in time targets are predicted; targets: [sequences, q], IGNORED where a
    sequence has fewer than another; kept: [p], which of them, flattened, the one row predicts.
    ends: [sequences], the last token of each among all tokens of ids, flattened; wanted: [items] of
    labelled answers, else [0]; advantages: [items] of drawn ones, else [0]; tokens: without
    padding.
    """

    sequences: Sequence[Sequenced]
    sizes: Sequence[int] | None
    ids: torch.Tensor
    places: torch.Tensor
    spans: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    kept: torch.Tensor | None
    ends: torch.Tensor
    tokens: int
    wanted: torch.Tensor
    advantages: torch.Tensor
    pad_id: int

    def to(self, device: str | torch.device) -> "Batch":
        """The same on a device."""
        if str(device) == "cpu":
            return self
        moved: dict[str, Any] = {
            each.name: value.to(device)
            for each in fields(self)
            if isinstance(value := getattr(self, each.name), torch.Tensor)
        }
        return replace(self, **moved)

    def halves(self) -> tuple["Batch", "Batch"]:
        """All first sequences, and all second ones."""
        half = len(self.sequences) // 2
        first, second = (
            replace(lay_out(each, self.pad_id, shared=self.sizes is not None), wanted=self.wanted)
            for each in (self.sequences[:half], self.sequences[half:])
        )
        return first.to(self.ids.device), second.to(self.ids.device)

    def read_by(self, model: Any, **more: Any) -> Any:
        """A model's output for this group. more: of its arguments."""
        if self.sizes is not None or self._joined:
            more["position_ids"] = self.places
        if self._joined:
            # Else transformers would keep apart what starts anew at position 0.
            more["attention_mask"] = torch.ones_like(self.ids)
        with reading(Reading(self.sizes, self.spans)):
            return model(input_ids=self.ids, use_cache=False, **more)

    @property
    def _joined(self) -> bool:
        return any(len(each) > 1 for each in self.sequences)


def collate(items: Sequence[Item], pad_id: int, *, shared: bool = False) -> Batch:
    """Lay out a group of items. shared: in one row, for a model that can keep them apart in it."""
    columns = zip(*map(_sequences, _unpacked(items)), strict=True)
    batch = lay_out([each for column in columns for each in column], pad_id, shared=shared)
    wanted = [item.wanted for item in items if isinstance(item, Labelled)]
    advantages = [item.advantage for item in items if isinstance(item, Drawn)]
    return replace(
        batch,
        wanted=torch.tensor(wanted, dtype=torch.bool),
        advantages=torch.tensor(advantages, dtype=torch.float32),
    )


def _unpacked(items: Sequence[Item]) -> list[Item]:
    """With examples that are packed, but see nothing of one another, each for itself."""
    return [
        each
        for item in items
        for each in (item.parts if isinstance(item, Pack) and item.apart else (item,))
    ]


def _sequences(item: Item) -> list[Sequenced]:
    return [item.parts] if isinstance(item, Pack) else [(each,) for each in sequences_of(item)]


def lay_out(sequences: Sequence[Sequenced], pad_id: int, *, shared: bool) -> Batch:
    """Lay out sequences. Logits are wanted only where something is learned, hence ``positions``."""
    return (_in_one_row if shared else _in_rows)(sequences, pad_id)


def _in_rows(sequences: Sequence[Sequenced], pad_id: int) -> Batch:
    """A row each. Nothing attends to padding: it stands right, and masks are causal."""
    columns = zip(_columns(sequences), (pad_id, 0, 1, IGNORED), strict=True)
    ids, places, spans, following = (_padded(rows, fill) for rows, fill in columns)
    positions = (following != IGNORED).any(0).nonzero().flatten()
    if not len(positions):
        positions = torch.zeros(1, dtype=torch.long)
    lengths = torch.tensor([_length(each) for each in sequences])
    return Batch(
        sequences=sequences,
        sizes=None,
        ids=ids,
        places=places,
        spans=spans,
        positions=positions,
        targets=following[:, positions],
        kept=None,
        ends=torch.arange(len(sequences)) * ids.shape[1] + lengths - 1,
        tokens=int(lengths.sum()),
        wanted=_UNLABELLED,
        advantages=_NOT_DRAWN,
        pad_id=pad_id,
    )


def _in_one_row(sequences: Sequence[Sequenced], pad_id: int) -> Batch:
    """One after the other. Targets stand as if each had a row, so that losses read them alike."""
    columns = _columns(sequences)
    ids, places, spans, following = (torch.tensor([[*chain(*rows)]]) for rows in columns)
    learned = [[label for label in row if label != IGNORED] for row in columns[-1]]
    targets = _padded(learned, IGNORED)
    sizes = [_length(each) for each in sequences]
    return Batch(
        sequences=sequences,
        sizes=sizes,
        ids=ids,
        places=places,
        spans=spans,
        positions=(following[0] != IGNORED).nonzero().flatten(),
        targets=targets,
        kept=(targets.flatten() != IGNORED).nonzero().flatten(),
        ends=torch.tensor(sizes).cumsum(0) - 1,
        tokens=sum(sizes),
        wanted=_UNLABELLED,
        advantages=_NOT_DRAWN,
        pad_id=pad_id,
    )


_UNLABELLED = torch.zeros(0, dtype=torch.bool)
_NOT_DRAWN = torch.zeros(0)


def _length(sequence: Sequenced) -> int:
    return sum(len(each.ids) for each in sequence)


def _columns(sequences: Sequence[Sequenced]) -> tuple[list[list[int]], ...]:
    """Of each sequence: ids, where each token is in its example, how long that is, what follows.

    Nothing follows the last token of an example: the first of the next one is not its affair.
    """
    return (
        [[i for each in s for i in each.ids] for s in sequences],
        [[i for each in s for i in range(len(each.ids))] for s in sequences],
        [[len(each.ids) for each in s for _ in each.ids] for s in sequences],
        [[i for each in s for i in (*each.labels[1:], IGNORED)] for s in sequences],
    )


def _padded(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
    """[rows, longest], at least one wide."""
    width = max(1, *map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
