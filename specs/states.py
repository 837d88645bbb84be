"""The states of a job and the one table of moves between them.

The SQL trigger, the drawing in docs/states.md, the actions that the API allows and the tests all
derive from ``TRANSITIONS``; nothing else decides where a job may go.
"""

from collections.abc import Mapping
from enum import StrEnum


class JobState(StrEnum):
    """Where a job stands. Only ``tuneyard.models.events.apply_event`` changes it."""

    BLOCKED = "blocked"  # waits for jobs or files that it depends on, or for its time
    QUEUED = "queued"  # may run; waits for devices
    DISPATCHED = "dispatched"  # has devices and an attempt; no runner yet
    RUNNING = "running"  # a runner's process is alive
    PAUSING = "pausing"  # asked to stop at a checkpoint and keep its place
    PAUSED = "paused"  # holds no device; goes on when someone resumes it
    CANCELLING = "cancelling"  # asked to stop for good; the runner is ending
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class JobEvent(StrEnum):
    """What happens to a job."""

    SUBMIT = "submit"
    INPUTS_READY = "inputs_ready"
    INPUT_FAILED = "input_failed"
    INPUT_CANCELLED = "input_cancelled"
    PLACE = "place"
    STARTED = "started"
    SUCCEED = "succeeded"
    FAIL = "failed"
    LOSE = "lost"
    RETRY = "retried"
    STOP = "stopped"
    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"


S, E = JobState, JobEvent

TERMINAL = frozenset({S.SUCCEEDED, S.FAILED, S.CANCELLED})
"""States that never change again."""

LIVE = frozenset({S.DISPATCHED, S.RUNNING, S.PAUSING, S.CANCELLING})
"""States in which the job has exactly one live attempt."""

INITIAL = frozenset({S.BLOCKED, S.QUEUED})
"""States in which a submission may begin."""

TRANSITIONS: Mapping[tuple[JobState, JobEvent], frozenset[JobState]] = {
    (S.BLOCKED, E.INPUTS_READY): frozenset({S.QUEUED}),
    (S.BLOCKED, E.INPUT_FAILED): frozenset({S.FAILED}),
    (S.PAUSED, E.INPUT_FAILED): frozenset({S.FAILED}),
    (S.BLOCKED, E.INPUT_CANCELLED): frozenset({S.CANCELLED}),
    (S.PAUSED, E.INPUT_CANCELLED): frozenset({S.CANCELLED}),
    (S.QUEUED, E.PLACE): frozenset({S.DISPATCHED}),
    (S.DISPATCHED, E.STARTED): frozenset({S.RUNNING}),
    # Exit code 0 wins over any stop that was asked meanwhile.
    (S.DISPATCHED, E.SUCCEED): frozenset({S.SUCCEEDED}),
    (S.RUNNING, E.SUCCEED): frozenset({S.SUCCEEDED}),
    (S.PAUSING, E.SUCCEED): frozenset({S.SUCCEEDED}),
    (S.CANCELLING, E.SUCCEED): frozenset({S.SUCCEEDED}),
    (S.DISPATCHED, E.FAIL): frozenset({S.FAILED}),
    (S.RUNNING, E.FAIL): frozenset({S.FAILED}),
    (S.PAUSING, E.FAIL): frozenset({S.FAILED}),
    (S.CANCELLING, E.FAIL): frozenset({S.CANCELLED}),
    (S.DISPATCHED, E.LOSE): frozenset({S.QUEUED}),
    (S.RUNNING, E.LOSE): frozenset({S.QUEUED}),
    (S.PAUSING, E.LOSE): frozenset({S.PAUSED}),
    (S.CANCELLING, E.LOSE): frozenset({S.CANCELLED}),
    (S.DISPATCHED, E.RETRY): frozenset({S.QUEUED}),
    (S.RUNNING, E.RETRY): frozenset({S.QUEUED}),
    (S.PAUSING, E.RETRY): frozenset({S.PAUSED}),
    (S.CANCELLING, E.RETRY): frozenset({S.CANCELLED}),
    (S.DISPATCHED, E.STOP): frozenset({S.QUEUED}),
    (S.RUNNING, E.STOP): frozenset({S.QUEUED}),
    (S.PAUSING, E.STOP): frozenset({S.PAUSED}),
    (S.CANCELLING, E.STOP): frozenset({S.CANCELLED}),
    (S.BLOCKED, E.CANCEL): frozenset({S.CANCELLED}),
    (S.QUEUED, E.CANCEL): frozenset({S.CANCELLED}),
    (S.PAUSED, E.CANCEL): frozenset({S.CANCELLED}),
    (S.DISPATCHED, E.CANCEL): frozenset({S.CANCELLING}),
    (S.RUNNING, E.CANCEL): frozenset({S.CANCELLING}),
    (S.PAUSING, E.CANCEL): frozenset({S.CANCELLING}),
    (S.BLOCKED, E.PAUSE): frozenset({S.PAUSED}),
    (S.QUEUED, E.PAUSE): frozenset({S.PAUSED}),
    (S.DISPATCHED, E.PAUSE): frozenset({S.PAUSING}),
    (S.RUNNING, E.PAUSE): frozenset({S.PAUSING}),
    # The one open choice: blocked while inputs are open, queued otherwise.
    (S.PAUSED, E.RESUME): frozenset({S.QUEUED, S.BLOCKED}),
}
"""(state, event) -> the states it may lead to. What is not listed cannot happen."""


def next_state(state: JobState, event: JobEvent) -> JobState | None:
    """The state that an event leads to, or None where it may not happen.

    ``resume`` gives queued; whoever knows that inputs are open picks blocked instead.
    """
    targets = TRANSITIONS.get((state, event))
    if targets is None:
        return None
    return S.QUEUED if S.QUEUED in targets else next(iter(targets))


def allowed_actions(state: JobState) -> list[str]:
    """What a person may ask of a job in this state."""
    if state in TERMINAL:
        return ["retry"]
    return ["cancel"] if (state, E.CANCEL) in TRANSITIONS else []


def moves() -> frozenset[tuple[JobState, JobEvent, JobState]]:
    """Every legal move as (from, event, to), as the database's table ``transitions`` holds them."""
    return frozenset(
        (state, event, target)
        for (state, event), targets in TRANSITIONS.items()
        for target in targets
    )
