"""A child as data: what to run, how to know that it is ready, how to end it."""

import hashlib
import json
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tuneyard.local.processes import ProcessId

BACKOFF_FIRST_S = 0.2
BACKOFF_MOST_S = 10.0
STOOD_S = 10.0
"""A child that lived this long is started again without delay the next time."""


def alive(process: ProcessId) -> bool:
    """Ready as soon as it runs."""
    return process.alive


@dataclass(frozen=True)
class Child:
    """One process of this machine.

    stage: children of one stage start together, once all of the stages before are ready.
    once: it runs to its end, exit code 0, before the next stage starts.
    settings: what its settings file holds; a change of it starts the child anew.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)
    stage: int = 0
    is_ready: Callable[[ProcessId], bool] = alive
    ready_within_s: float = 60.0
    stop_signal: signal.Signals = signal.SIGTERM
    stop_within_s: float = 10.0
    once: bool = False
    settings: str = field(default="", repr=False)

    @property
    def fingerprint(self) -> str:
        """Differs when a running child was started for something else."""
        asked = json.dumps([self.argv, self.settings])
        return hashlib.sha256(asked.encode()).hexdigest()


def backoff_s(failures: int) -> float:
    """Seconds before the next start after so many quick ends in a row: 0.2, 0.4, … 10."""
    return min(BACKOFF_MOST_S, BACKOFF_FIRST_S * 2.0 ** min(failures, 16))
