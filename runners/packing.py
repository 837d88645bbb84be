"""Which examples go together: in a pack that counts as one row, or in a group of a step.

The first changes the run and is asked for (packing, neat_packing); the second changes its speed.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import overload

from tuneyard.runners.examples import Example, Item, Pack, sequences_of
from tuneyard.specs.finetune import RowsSpec

ROWS_AT_ONCE = 1000
"""Rows that packs are made of at a time: LLaMA-Factory's preprocessing_batch_size."""


def knapsacks(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of what goes into each pack: over and over the longest that still fits.

    Source: behaviour of LLaMA-Factory 0.9.5, greedy_knapsack in data/processor/processor_utils.py;
    of several of one length the last comes first. What fits into no pack is left out.

    >>> knapsacks([5, 9, 3, 5, 2, 11], 10)
    [[1], [3, 0], [2, 4]]
    """
    left = sorted((length, i) for i, length in enumerate(lengths) if length <= capacity)
    packs = []
    while left:
        room, pack = capacity, list[int]()
        while fitting := bisect_right(left, room, key=lambda each: each[0]):
            length, index = left.pop(fitting - 1)
            room -= length
            pack.append(index)
        packs.append(pack)
    return packs


class Packs(Sequence[Pack]):
    """Examples packed within ``capacity`` tokens, in the order in which packs were filled."""

    def __init__(self, examples: Sequence[Item], capacity: int, *, apart: bool) -> None:
        self._examples, self._apart = examples, apart
        self._indices: list[list[int]] = []
        for start in range(0, len(examples), ROWS_AT_ONCE):
            lengths = [tokens_of(each) for each in examples[start : start + ROWS_AT_ONCE]]
            for pack in knapsacks(lengths, capacity):
                self._indices.append([start + i for i in pack])

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Pack: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Pack]: ...
    def __getitem__(self, index: int | slice) -> Pack | Sequence[Pack]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        parts = (self._examples[i] for i in self._indices[index])
        return Pack(tuple(part for part in parts if isinstance(part, Example)), self._apart)


def packed(items: Sequence[Item], arguments: RowsSpec) -> Sequence[Item]:
    """Several examples as one row, where that is asked for; texts were joined when tokenised."""
    if not arguments.packs_rows or not items:
        return items
    return Packs(items, arguments.tokens_kept, apart=arguments.neat_packing)


def tokens_of(item: Item) -> int:
    """How many tokens a model reads of an item."""
    return sum(len(each.ids) for each in sequences_of(item))


def filled_groups(items: Sequence[Item], rows_per_group: int) -> list[list[Item]]:
    """The items of a step in groups that are as full as the fullest of the plain recipe's.

    That one is padded: its longest sequence times its sequences. So no group needs more memory than
    the plain recipe needs in this step, and there are never more groups. Longest first, each into
    the first group that has room.
    """
    plain = [items[i : i + rows_per_group] for i in range(0, len(items), rows_per_group)]
    budget = max(map(_padded_tokens, plain))
    groups: list[list[Item]] = []
    rooms: list[int] = []
    for item in sorted(items, key=tokens_of, reverse=True):
        size = tokens_of(item)
        fitting = next((i for i, room in enumerate(rooms) if room >= size), len(rooms))
        if fitting == len(rooms):
            groups.append([])
            rooms.append(budget)
        groups[fitting].append(item)
        rooms[fitting] -= size
    return groups if len(groups) <= len(plain) else [list(group) for group in plain]


def _padded_tokens(items: Sequence[Item]) -> int:
    lengths = [length for item in items for length in _row_lengths(item)]
    return max(lengths) * len(lengths)


def _row_lengths(item: Item) -> list[int]:
    if isinstance(item, Pack) and not item.apart:
        return [tokens_of(item)]
    return [len(each.ids) for each in sequences_of(item)]
