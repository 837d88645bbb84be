"""A process that serves no HTTP shows that it goes on: it touches a file at each turn of its loop.

The loop turns while the database or the broker is away too: what is told apart is a process that
hangs, not one that waits.
"""

import time
from pathlib import Path

from tuneyard.specs.settings import Settings


def beat_file(settings: Settings, process: str) -> Path:
    """The file whose age tells."""
    return settings.home / f"{process}.beat"


def beat(settings: Settings, process: str) -> None:
    """Say that a process goes on; a folder that cannot be written does not stop it."""
    file = beat_file(settings, process)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError:
        pass  # `tuneyard health` says so


def beat_age_s(settings: Settings, process: str) -> float | None:
    """Seconds since the last beat; None where there was none."""
    try:
        return max(0.0, time.time() - beat_file(settings, process).stat().st_mtime)
    except OSError:
        return None
