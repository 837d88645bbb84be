"""Which checkpoints stay in the work folder."""

import os
import shutil
from pathlib import Path

from tuneyard.specs.runner import CHECKPOINTS

KEPT = 2
"""How many of the newest stay, beside the best."""


def drop_old(
    workdir: Path, *, newest: int, best: int | None = None, limit: int | None = None
) -> None:
    """Remove checkpoints beyond the newest ``limit`` and the best; ``newest`` is whole by now."""
    folder = workdir / CHECKPOINTS
    steps = sorted(int(p.name.removeprefix("step-")) for p in folder.glob("step-*"))
    kept = {newest, best, *steps[-(limit or KEPT) :]}
    for step in steps:
        if step not in kept:
            away = folder / f".old-{step}"
            os.rename(folder / f"step-{step}", away)  # never half a checkpoint under its name
            shutil.rmtree(away, ignore_errors=True)
