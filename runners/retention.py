"""Which checkpoints stay in the work folder, and what one says of itself to whoever keeps them."""

import math
import os
import shutil
from pathlib import Path
from typing import Any

from tuneyard.specs.runner import CHECKPOINTS, KEPT_CHECKPOINTS

RESUME_POINT_S = 600.0
"""A checkpoint is never older than this, whatever was asked."""


def checkpoint_meta(
    step: int,
    eval_loss: float | None = None,
    rank: float | None = None,
    best_step: int | None = None,
) -> dict[str, Any]:
    """What a checkpoint's manifest holds beside its files; the store keeps the best by it.

    eval_loss: of this very step, where it was measured; rank: what evaluations are compared by,
    turned so that less is better. best_step: whose model was the best so far; whoever goes on from
    this checkpoint may need that one too.
    """
    meta: dict[str, Any] = {"kind": "checkpoint", "step": step}
    if eval_loss is not None and math.isfinite(eval_loss):
        meta["eval_loss"] = eval_loss
    if rank is not None and math.isfinite(rank):
        meta["rank"] = rank
    if best_step is not None:
        meta["best_step"] = best_step
    return meta


def drop_old(
    workdir: Path, *, newest: int, best: int | None = None, limit: int | None = None
) -> None:
    """Remove checkpoints beyond the newest ``limit`` and the best; ``newest`` is whole by now."""
    folder = workdir / CHECKPOINTS
    steps = sorted(int(p.name.removeprefix("step-")) for p in folder.glob("step-*"))
    kept = {newest, best, *steps[-(limit or KEPT_CHECKPOINTS) :]}
    for step in steps:
        if step not in kept:
            away = folder / f".old-{step}"
            os.rename(folder / f"step-{step}", away)  # never half a checkpoint under its name
            shutil.rmtree(away, ignore_errors=True)
