"""Rows as tokens, kept in a folder: made once on a CPU, read piece by piece where they are learned.

Each split is a safetensors file of three flat arrays: ``ids`` and ``labels`` (int32, all rows one
after the other) and ``ends`` (int64, where each row ends). tokens.json says what made them.
"""

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from tuneyard.runners.examples import Example
from tuneyard.runners.failures import BadSpec

ABOUT_FILE = "tokens.json"
TRAINING, HELD_OUT = "training", "held_out"


class TokenRows(Sequence[Example]):
    """The examples of a file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="np")
        self._ids, self._labels = self._file.get_slice("ids"), self._file.get_slice("labels")
        self._ends = self._file.get_tensor("ends")

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start = int(self._ends[index - 1]) if index else 0
        end = int(self._ends[index])
        return Example(self._ids[start:end].tolist(), self._labels[start:end].tolist())


class RowWriter:
    """Collects examples of one split in flat arrays."""

    def __init__(self) -> None:
        self._ids, self._labels, self._ends = array("i"), array("i"), array("q")

    def add(self, examples: Iterable[Example]) -> None:
        """Append examples."""
        for example in examples:
            self._ids.extend(example.ids)
            self._labels.extend(example.labels)
            self._ends.append(len(self._ids))

    @property
    def tokens(self) -> int:
        """How many tokens were added."""
        return len(self._ids)

    def write(self, path: Path) -> None:
        """Write the file."""
        save_file(
            {
                "ids": np.frombuffer(self._ids, np.int32),
                "labels": np.frombuffer(self._labels, np.int32),
                "ends": np.frombuffer(self._ends, np.int64),
            },
            path,
        )


def digest_of(examples: Iterable[Example]) -> str:
    """What tells the examples of two runs apart."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(array("q", [len(example.ids), *example.ids, *example.labels]).tobytes())
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
