"""The runner's side of WORKDIR/events.jsonl: one line, one write()."""

import json
import math
import os
import threading
import time
from pathlib import Path
from typing import Any

from tuneyard.specs.runner import EVENTS_FILE, MAX_LINE_BYTES


class EventLog:
    """Appends numbered events. A reader sees each line whole, or torn at the very end."""

    def __init__(self, workdir: Path) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._handle = os.open(workdir / EVENTS_FILE, flags, 0o644)
        self._n = 0
        self._writing = threading.Lock()
        self._close_torn_line()

    def emit(self, type_: str, **fields: Any) -> None:
        """Write one event, from any thread. Its keys are those of specs/runner.py."""
        with self._writing:
            self._n += 1
            event = {
                "v": 1,
                "n": self._n,
                "t_mono": round(time.monotonic(), 6),
                "type": type_,
                **fields,
            }
            os.write(self._handle, _line(event))

    def metric(self, step: int, **values: float) -> None:
        """Write what was measured at a step; what is not finite has no place in JSON."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self.emit("metric", step=step, values=finite)

    def warn(self, code: str, message: str) -> None:
        """Tell a person something that does not stop the work."""
        self.emit("warning", code=code, message=message)

    def _close_torn_line(self) -> None:
        size = os.fstat(self._handle).st_size
        if size and os.pread(self._handle, 1, size - 1) != b"\n":
            os.write(self._handle, b"\n")


def _line(event: dict[str, Any]) -> bytes:
    """The event as one line of at most MAX_LINE_BYTES; its longest texts give way."""
    text_bytes = MAX_LINE_BYTES
    while True:
        line = json.dumps(_clipped(event, text_bytes), allow_nan=False).encode() + b"\n"
        if len(line) <= MAX_LINE_BYTES or text_bytes == 0:
            return line
        text_bytes //= 2


def _clipped(value: Any, length: int) -> Any:
    if isinstance(value, str):
        return value if len(value) <= length else value[:length] + "…"
    if isinstance(value, dict):
        return {key: _clipped(each, length) for key, each in value.items()}
    return value
