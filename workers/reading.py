"""What a runner writes, read from an offset on; a torn last line is left for the next time."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tuneyard.specs.exits import RunnerEnd
from tuneyard.specs.runner import (
    EVENTS_FILE,
    LOG_FILE,
    MAX_LINE_BYTES,
    Checkpoint,
    Failed,
    Metric,
    Phase,
    Progress,
    RunnerEvent,
    Sample,
    Warned,
)

log = logging.getLogger(__name__)

LOG_PIECE_BYTES = 1024**2
EVENTS_PIECE_BYTES = 4 * 1024**2

_EVENT: TypeAdapter[RunnerEvent] = TypeAdapter(RunnerEvent)


@dataclass(frozen=True)
class Reading:
    """What stood in a runner's files from the offsets on, sorted by what is done with it."""

    events_offset: int
    log_offset: int
    log: bytes = b""
    metrics: Sequence[tuple[str, int, float]] = field(default_factory=list)
    phase: str | None = None
    progress: dict[str, Any] | None = None
    checkpoints: Sequence[Checkpoint] = field(default_factory=list)
    notes: Sequence[Warned | Sample] = field(default_factory=list)


def read_files(workdir: Path, *, events_offset: int, log_offset: int) -> Reading:
    """Read what is new. A last line without its end is read the next time."""
    piece = _read_from(workdir / EVENTS_FILE, events_offset, EVENTS_PIECE_BYTES)
    whole = piece[: piece.rfind(b"\n") + 1]
    if not whole and len(piece) > MAX_LINE_BYTES:
        whole = piece  # no runner of ours writes such a line: skip it rather than stand still
    logged = _read_from(workdir / LOG_FILE, log_offset, LOG_PIECE_BYTES)
    events = [event for line in whole.splitlines() if (event := parse_event(line)) is not None]
    phases = [e.phase for e in events if isinstance(e, Phase)]
    progress = [e for e in events if isinstance(e, Progress)]
    return Reading(
        events_offset=events_offset + len(whole),
        log_offset=log_offset + len(logged),
        log=logged,
        metrics=[
            (name, e.step, value)
            for e in events
            if isinstance(e, Metric)
            for name, value in e.values.items()
        ],
        phase=phases[-1] if phases else None,
        progress=_progress(progress[-1]) if progress else None,
        checkpoints=[e for e in events if isinstance(e, Checkpoint)],
        notes=[e for e in events if isinstance(e, Warned | Sample)],
    )


@dataclass(frozen=True)
class LastWords:
    """Why a runner said it would end, and the end of its log for when it said nothing."""

    failed: Failed | None
    log_tail: str
    wanted_bytes: int = 0  # of the disk: the total of a download's last progress

    def evidence(self, end: RunnerEnd) -> tuple[str, dict[str, Any] | None]:
        """A sentence or two for the job's owner, and the arguments that would help, if any."""
        if self.failed is not None:
            return self.failed.evidence, self.failed.patch or None
        if end.signal is not None:
            said = f"the runner was killed by signal {end.signal}"
            return said + (": the system ran out of memory" if end.oom_killed else ""), None
        if end.code is None:
            return "the runner and its guard are gone without a word", None
        return f"the runner ended with exit code {end.code}; its log ends:\n{self.log_tail}", None


def read_last_words(workdir: Path) -> LastWords:
    """Read the ends of a runner's files."""
    events = [parse_event(line) for line in _tail(workdir / EVENTS_FILE, 4 * MAX_LINE_BYTES)]
    failed = [event for event in events if isinstance(event, Failed)]
    progress = [event for event in events if isinstance(event, Progress)]
    totals = [event.total or 0 for event in progress if event.unit == "bytes"]
    lines = _tail(workdir / LOG_FILE, 4096)[-15:]
    return LastWords(
        failed[-1] if failed else None,
        _storable(b"\n".join(lines).decode(errors="replace").strip()),
        max(totals, default=0),
    )


def _tail(path: Path, size: int) -> list[bytes]:
    try:
        return _read_from(path, max(0, path.stat().st_size - size), size).splitlines()
    except FileNotFoundError:
        return []


def parse_event(line: bytes) -> RunnerEvent | None:
    """One event; None for a type that this version does not know or a line that is none."""
    try:
        return _EVENT.validate_python(_storable(json.loads(line)))
    except (ValueError, ValidationError, RecursionError):
        log.debug("event line skipped", extra={"event": "event_skipped", "line": line[:200]})
        return None


def _storable(value: Any) -> Any:
    """The same without what PostgreSQL cannot hold: NUL, half characters, numbers that are none."""
    if isinstance(value, str):
        return value.replace("\x00", "\ufffd").encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_storable(name): _storable(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_storable(inner) for inner in value]
    return value


def _progress(event: Progress) -> dict[str, Any]:
    eta_s = event.eta_s if event.eta_s is not None and math.isfinite(event.eta_s) else None
    return {"done": event.done, "total": event.total, "unit": event.unit, "eta_s": eta_s}


def _read_from(path: Path, offset: int, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(limit)
    except FileNotFoundError:
        return b""
