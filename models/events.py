"""The door through which a job changes its state, and the timeline that it leaves behind."""

from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, func, insert, select, update

from tuneyard.models.tables import EventRow, JobRow
from tuneyard.specs.errors import IllegalEvent, NotFound
from tuneyard.specs.states import TERMINAL, JobEvent, JobState, next_state

JOB_CHANNEL = "tuneyard_job"
"""NOTIFY with a job's id: something about it can be read anew."""

SCHEDULER_CHANNEL = "tuneyard_scheduler"
"""NOTIFY without payload: there may be something to place."""


def node_channel(node_id: UUID) -> str:
    """The channel on which one node's worker is woken."""
    return f"tuneyard_node_{node_id.hex}"


def notify(tx: Connection, channel: str, payload: str = "") -> None:
    """Wake the listeners of a channel when this transaction commits."""
    tx.execute(select(func.pg_notify(channel, payload)))


@dataclass(frozen=True)
class LockedJob:
    """A job whose row this transaction holds."""

    id: UUID
    team_id: UUID
    state: JobState


def lock_job(tx: Connection, job_id: UUID) -> LockedJob:
    """Lock a job's row: the first lock of every transaction about a job. Raises: NotFound."""
    row = tx.execute(
        select(JobRow.team_id, JobRow.state).where(JobRow.id == job_id).with_for_update()
    ).one_or_none()
    if row is None:
        raise NotFound("There is no such job here.", field="job")
    return LockedJob(job_id, row.team_id, JobState(row.state))


def apply_event(
    tx: Connection,
    job_id: UUID,
    event: JobEvent,
    *,
    attempt_id: UUID | None = None,
    data: dict[str, Any] | None = None,
    error: dict[str, Any] | None = None,
    to: JobState | None = None,
) -> JobState:
    """Move a job along TRANSITIONS and record it; nothing else writes ``jobs.state``.

    ``to`` picks between the two targets of ``resume``. Raises: NotFound, IllegalEvent.
    """
    job = lock_job(tx, job_id)
    target = to or next_state(job.state, event)
    if target is None:
        raise IllegalEvent(f"A job that is {job.state} cannot be met by {event}.")
    changes: dict[str, Any] = {"state": target.value}
    if target in TERMINAL:
        changes |= {"finished_at": func.clock_timestamp(), "wait_reason": None}
    if error is not None:
        changes["error"] = error
    line = Line(event.value, job.state, target, attempt_id, data or error or {})
    _append(tx, job, line, changes)
    if target in TERMINAL or target is JobState.QUEUED:
        notify(tx, SCHEDULER_CHANNEL)
    return target


def record_event(
    tx: Connection,
    job_id: UUID,
    type_: str,
    *,
    attempt_id: UUID | None = None,
    data: dict[str, Any] | None = None,
) -> None:
    """Add a line to a job's timeline that changes no state (checkpoint, warning, …)."""
    _append(tx, lock_job(tx, job_id), Line(type_, attempt_id=attempt_id, data=data or {}))


def record_submission(tx: Connection, job_id: UUID, team_id: UUID, state: JobState) -> None:
    """Write the first line of a job's timeline."""
    job = LockedJob(job_id, team_id, state)
    _append(tx, job, Line(JobEvent.SUBMIT.value, to_state=state))
    if state is JobState.QUEUED:
        notify(tx, SCHEDULER_CHANNEL)


@dataclass(frozen=True)
class Line:
    """A line to be written; its number and time come from the database."""

    type: str
    from_state: JobState | None = None
    to_state: JobState | None = None
    attempt_id: UUID | None = None
    data: dict[str, Any] = field(default_factory=dict)


def _append(
    tx: Connection, job: LockedJob, line: Line, changes: dict[str, Any] | None = None
) -> None:
    """Change the job's row and write the line with the next number, under the row's lock."""
    seq = tx.execute(
        update(JobRow)
        .where(JobRow.id == job.id)
        .values({"last_seq": JobRow.last_seq + 1} | (changes or {}))
        .returning(JobRow.last_seq)
    ).scalar_one()
    tx.execute(
        insert(EventRow).values(
            job_id=job.id,
            seq=seq,
            team_id=job.team_id,
            attempt_id=line.attempt_id,
            type=line.type,
            from_state=line.from_state,
            to_state=line.to_state,
            data=line.data,
        )
    )
    notify(tx, JOB_CHANNEL, job.id.hex)
