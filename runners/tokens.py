"""Rows as tokens, kept in a folder: made once on a CPU, read piece by piece where they are learned.

Each split is a safetensors file of flat arrays: ``ids`` and ``labels`` (int32, all sequences one
after the other) and ``ends`` (int64, where each ends). Of pairs and labelled answers two sequences
make an item; ``wanted`` (uint8, one an item) tells the latter. Of questions ``rows`` (uint8) and
``row_ends`` hold what asked them, as JSON. tokens.json says what made them.
"""

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, overload

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from tuneyard.runners.examples import Example, Item, Labelled, Pair, Question, sequences_of
from tuneyard.runners.failures import BadSpec
from tuneyard.runners.rows import Unanswered

ABOUT_FILE = "tokens.json"
TRAINING, HELD_OUT = "training", "held_out"


class TokenRows(Sequence[Item]):
    """The items of a file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="np")
        self._ids, self._labels = self._file.get_slice("ids"), self._file.get_slice("labels")
        self._ends = self._file.get_tensor("ends")
        names = self._file.keys()
        self._wanted = self._file.get_tensor("wanted") if "wanted" in names else None
        self._paired = "paired" in names or self._wanted is not None
        self._rows = self._file.get_slice("rows") if "rows" in names else None
        self._row_ends = self._file.get_tensor("row_ends") if "rows" in names else []

    def __len__(self) -> int:
        return len(self._ends) // (2 if self._paired else 1)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        if self._rows is not None:
            return Question(self._sequence(index).ids, self._row(index))
        if not self._paired:
            return self._sequence(index)
        first, second = self._sequence(2 * index), self._sequence(2 * index + 1)
        if self._wanted is None:
            return Pair(first, second)
        return Labelled(first, second, bool(self._wanted[index]))

    def _sequence(self, index: int) -> Example:
        start = int(self._ends[index - 1]) if index else 0
        end = int(self._ends[index])
        return Example(self._ids[start:end].tolist(), self._labels[start:end].tolist())

    def _row(self, index: int) -> Unanswered:
        assert self._rows is not None  # noqa: S101 - the caller looked
        start = int(self._row_ends[index - 1]) if index else 0
        return Unanswered(**json.loads(self._rows[start : int(self._row_ends[index])].tobytes()))


class RowWriter:
    """Collects the items of one split in flat arrays."""

    def __init__(self) -> None:
        self._ids, self._labels, self._ends = array("i"), array("i"), array("q")
        self._wanted, self._paired = array("B"), False
        self._rows, self._row_ends = bytearray(), array("q")

    def add(self, items: Iterable[Item]) -> None:
        """Append items, all of one form."""
        for item in items:
            self._paired |= not isinstance(item, Example | Question)
            if isinstance(item, Question):
                self._rows += _as_json(item.row)
                self._row_ends.append(len(self._rows))
            if isinstance(item, Labelled):
                self._wanted.append(item.wanted)
            for sequence in sequences_of(item):
                self._ids.extend(sequence.ids)
                self._labels.extend(sequence.labels)
                self._ends.append(len(self._ids))

    @property
    def tokens(self) -> int:
        """How many tokens were added."""
        return len(self._ids)

    def write(self, path: Path) -> None:
        """Write the file."""
        arrays: dict[str, np.ndarray[Any, Any]] = {
            "ids": np.frombuffer(self._ids, np.int32),
            "labels": np.frombuffer(self._labels, np.int32),
            "ends": np.frombuffer(self._ends, np.int64),
        }
        if self._wanted:
            arrays["wanted"] = np.frombuffer(self._wanted, np.uint8)
        elif self._paired:
            arrays["paired"] = np.ones(1, np.uint8)
        if self._row_ends:
            arrays["rows"] = np.frombuffer(self._rows, np.uint8)
            arrays["row_ends"] = np.frombuffer(self._row_ends, np.int64)
        save_file(arrays, path)


def _as_json(row: Unanswered) -> bytes:
    return json.dumps(asdict(row), sort_keys=True).encode()


def digest_of(items: Iterable[Item]) -> str:
    """What tells the items of two runs apart."""
    digest = hashlib.sha256()
    for item in items:
        for each in sequences_of(item):
            digest.update(array("q", [len(each.ids), *each.ids, *each.labels]).tobytes())
        if isinstance(item, Labelled):
            digest.update(bytes([item.wanted]))
        if isinstance(item, Question):
            digest.update(_as_json(item.row))
    return digest.hexdigest()


def split_file(folder: Path, split: str) -> Path:
    """Where a split of a folder of tokens stands."""
    return folder / f"{split}.safetensors"


def read_about(folder: Path, made_from: dict[str, Any]) -> dict[str, Any]:
    """What a folder of tokens says of itself. Raises: BadSpec when it was made from other things.

    made_from: arguments, template and tokenizer as this run has them.
    """
    about: dict[str, Any] = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
    for name, value in made_from.items():
        if about["made_from"].get(name) != value:
            raise BadSpec(
                f"The tokens were made with another {name}.",
                field="tokens",
                hint="leave tokens out of the inputs, or prepare them anew",
            )
    return about
