"""What a model reads right now: attention and noise must know where examples end.

No argument of transformers' models tells them, and most would be lost on the way through adapters.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Reading:
    """A forward pass. sizes: lengths of the sequences in its one row; None: a row for each.

    spans: [rows, time], of how many tokens the example is that a token belongs to.
    """

    sizes: Sequence[int] | None
    spans: torch.Tensor


_now: Reading | None = None


@contextlib.contextmanager
def reading(what: Reading) -> Iterator[None]:
    """While it lasts, this is what every model reads."""
    global _now
    before, _now = _now, what
    try:
        yield
    finally:
        _now = before


def now() -> Reading | None:
    """What is read; None outside a group of training or evaluation, as when text is generated."""
    return _now
