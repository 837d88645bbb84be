"""What a step minimises. A stage is one objective; the loop is the same for all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from tuneyard.runners.batches import Batch
from tuneyard.runners.examples import IGNORED, Example


@dataclass(frozen=True)
class Objective:
    """loss: the *sum* over a group of rows; units: how many terms of that sum a row brings.

    The loop divides by the units of the whole step, however it was split into groups.
    """

    loss: Callable[[Any, Batch], torch.Tensor]
    units: Callable[[Example], int]


def token_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Sum of -log p over the targets. Logits [rows, positions, vocabulary] are widened to fp32."""
    logits = model(input_ids=batch.ids, use_cache=False, logits_to_keep=batch.positions).logits
    return cross_entropy(
        logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


SFT = Objective(loss=token_loss, units=lambda example: example.targets)
