"""How well a model does on rows that it does not learn: the same while it learns and afterwards."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from tuneyard.runners.batches import collate
from tuneyard.runners.examples import Item
from tuneyard.runners.losses import Objective, Outcome, summary


@torch.no_grad()
def measure(
    model: Any,
    items: Sequence[Item],
    objective: Objective,
    *,
    rows: int,
    pad_id: int,
    device: str,
    before_each: Callable[[int], None],
    casting: Callable[[], AbstractContextManager[Any]] = nullcontext,
    shared: bool = False,
) -> tuple[float, dict[str, float]]:
    """The loss over all units of the items together, and the measures beside it.

    rows: how many at a time; before_each: told how many are done, it may raise; casting: how the
    model computes; shared: it keeps sequences apart that stand in one row.
    """
    units, parts = 0, []
    for start in range(0, len(items), rows):
        before_each(start)
        group = items[start : start + rows]
        units += sum(map(objective.units, group))
        batch = collate(group, pad_id, shared=shared).to(device)
        with casting():
            outcome = objective.loss(model, batch)
        parts.append(Outcome(outcome.loss.double(), outcome.measures))
    loss, measures = summary(parts)
    return loss / units, measures
