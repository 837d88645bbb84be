"""An attempt's life, as its worker and the scheduler write it; every write is fenced by its token.

Lock order everywhere: job, attempt, members, allocations, devices.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Update, func, select, text, update

from tuneyard.models.dependencies import settle_children
from tuneyard.models.events import apply_event, lock_job, record_event
from tuneyard.models.tables import AttemptRow, MemberRow
from tuneyard.specs.errors import StaleToken
from tuneyard.specs.exits import (
    MAX_CHARGED,
    MAX_LOST_WORKERS,
    MAX_UNCHARGED,
    Cause,
    Outcome,
    StopReason,
    Verdict,
    after_stop,
)
from tuneyard.specs.states import TERMINAL, JobEvent, JobState

MAX_PAUSE_S = 300.0


@dataclass(frozen=True)
class AttemptRef:
    """Which attempt of which job, and the token that lets its worker write."""

    id: UUID
    job_id: UUID
    team_id: UUID
    number: int
    token: int


@dataclass(frozen=True)
class Assignment:
    """An attempt that is placed on a node and not over."""

    ref: AttemptRef
    kind: str
    name: str
    claimed_by: str | None  # the boot_id of the worker's life that claimed it
    phase: str
    stop_reason: StopReason | None


ASSIGNMENTS = text("""
    SELECT a.id, a.job_id, a.team_id, a.number, a.token, a.phase, a.stop_reason,
           j.kind, j.name,
           CASE WHEN m.claimed_at IS NOT NULL THEN m.boot_id END AS claimed_by
    FROM members m
    JOIN attempts a ON a.id = m.attempt_id
    JOIN jobs j ON j.id = a.job_id
    WHERE m.node_id = :node
      -- Over for this node, or for all.
      AND m.ended_at IS NULL AND a.ended_at IS NULL
      -- A lease that ran out is the reaper's.
      AND m.lease_expires_at > clock_timestamp()
    ORDER BY a.token
""")


def assignments(tx: Connection, node_id: UUID) -> list[Assignment]:
    """What is placed on a node: the truth behind every hint."""
    return [
        Assignment(
            AttemptRef(row.id, row.job_id, row.team_id, row.number, row.token),
            row.kind,
            row.name,
            row.claimed_by,
            row.phase,
            StopReason(row.stop_reason) if row.stop_reason else None,
        )
        for row in tx.execute(ASSIGNMENTS, {"node": node_id})
    ]


CLAIM = text("""
    UPDATE members m
    SET claimed_at = clock_timestamp(), boot_id = :boot_id,
        lease_expires_at = clock_timestamp() + make_interval(secs => :lease_s)
    FROM attempts a
    WHERE a.id = m.attempt_id AND a.token = :token AND a.ended_at IS NULL
      AND m.attempt_id = :attempt AND m.node_id = :node
      AND m.claimed_at IS NULL AND m.ended_at IS NULL
      AND m.lease_expires_at > clock_timestamp()
""")


def claim(tx: Connection, ref: AttemptRef, node_id: UUID, *, boot_id: str, lease_s: float) -> bool:
    """Take a placed attempt: its first renewal. False when it is no longer to be had."""
    values = {"attempt": ref.id, "token": ref.token, "node": node_id}
    done = tx.execute(CLAIM, values | {"boot_id": boot_id, "lease_s": lease_s})
    return done.rowcount == 1


RENEW = text("""
    UPDATE members m
    SET lease_expires_at = clock_timestamp() + make_interval(secs => :lease_s)
    FROM attempts a, unnest(CAST(:ids AS uuid[]), CAST(:tokens AS bigint[])) AS mine (id, token)
    WHERE a.id = mine.id AND a.token = mine.token AND a.ended_at IS NULL
      AND m.attempt_id = a.id AND m.node_id = :node AND m.ended_at IS NULL
      -- An expired lease is never revived.
      AND m.lease_expires_at > clock_timestamp()
    RETURNING a.id
""")


def renew_leases(
    tx: Connection, refs: Sequence[AttemptRef], node_id: UUID, *, lease_s: float
) -> set[UUID]:
    """Renew a node's leases in one statement.

    Returns the attempts that were renewed; any other is over and must stop at once.
    """
    if not refs:
        return set()
    values = {"ids": [r.id for r in refs], "tokens": [r.token for r in refs]}
    return set(tx.execute(RENEW, values | {"node": node_id, "lease_s": lease_s}).scalars())


def check_token(tx: Connection, ref: AttemptRef) -> StopReason | None:
    """Lock a live attempt's row and say why it shall stop, if it shall. Raises: StaleToken."""
    row = tx.execute(
        select(AttemptRow.stop_reason)
        .where(AttemptRow.id == ref.id, AttemptRow.token == ref.token)
        .where(AttemptRow.ended_at.is_(None))
        .with_for_update()
    ).one_or_none()
    if row is None:
        raise StaleToken()
    return StopReason(row.stop_reason) if row.stop_reason else None


def report_started(tx: Connection, ref: AttemptRef) -> None:
    """The guard has a runner: dispatched -> running, once. Raises: StaleToken."""
    job = lock_job(tx, ref.job_id)
    check_token(tx, ref)
    if job.state is JobState.DISPATCHED:
        data = {"attempt": ref.number}
        apply_event(tx, ref.job_id, JobEvent.STARTED, attempt_id=ref.id, data=data)
    tx.execute(
        update(AttemptRow)
        .where(AttemptRow.id == ref.id)
        .values(running_at=func.coalesce(AttemptRow.running_at, func.clock_timestamp()))
    )


def release_devices(tx: Connection, ref: AttemptRef, *, device_state: str = "cleaning") -> None:
    """Every process of the attempt is gone: free its slots, let its GPUs be seen to be empty.

    Where some process would not go, ``unconfirmed`` keeps its devices from others until it has.
    The attempt itself goes on as ``publishing``. Raises: StaleToken.
    """
    lock_job(tx, ref.job_id)
    check_token(tx, ref)
    tx.execute(update(AttemptRow).where(AttemptRow.id == ref.id).values(phase="publishing"))
    free_slots(tx, ref.id, device_state=device_state)


FREE_SLOTS = text("""
    WITH freed AS (
        UPDATE allocations SET released_at = clock_timestamp()
        WHERE attempt_id = :attempt AND released_at IS NULL RETURNING slot_id
    )
    UPDATE devices d SET state = :state, state_at = clock_timestamp()
    FROM slots s JOIN freed f ON f.slot_id = s.id
    WHERE d.id = s.device_id AND d.state IN ('ok', 'cleaning')
      AND (d.kind = 'gpu' OR :state = 'unconfirmed')
""")
"""A CPU slot is free once its processes are gone; a GPU must be seen empty as well."""


def free_slots(tx: Connection, attempt_id: UUID, *, device_state: str) -> None:
    """Take an attempt's slots back; its GPUs wait in this state, its cores if ``unconfirmed``."""
    tx.execute(FREE_SLOTS, {"attempt": attempt_id, "state": device_state})


@dataclass(frozen=True)
class End:
    """How an attempt ended, for its row and its job's timeline."""

    verdict: Verdict
    evidence: str = ""
    patch: dict[str, Any] | None = None
    exit: dict[str, Any] | None = None


def finish_attempt(
    tx: Connection,
    ref: AttemptRef,
    end: End,
    *,
    record: Callable[[Connection], None] | None = None,
    backoff_s: float = 0.0,
    device_state: str = "cleaning",
) -> Verdict:
    """End a live attempt, record what it brought forth, move its job. Raises: StaleToken.

    Whether it was asked to stop is read under the lock, so a cancel that came last is honoured.
    """
    lock_job(tx, ref.job_id)
    verdict = after_stop(end.verdict, check_token(tx, ref))
    if record is not None:
        record(tx)
    ended = replace(end, verdict=verdict)
    end_attempt(tx, ref, ended, backoff_s=backoff_s, device_state=device_state)
    return verdict


def end_attempt(
    tx: Connection, ref: AttemptRef, end: End, *, backoff_s: float, device_state: str
) -> JobState:
    """End an attempt whose job and row this transaction holds."""
    verdict = end.verdict
    tx.execute(
        update(AttemptRow)
        .where(AttemptRow.id == ref.id)
        .values(
            outcome=verdict.outcome.value,
            cause=verdict.cause,
            charged=verdict.charged,
            evidence=end.evidence[:4000] or None,
            patch=end.patch,
            ended_at=func.clock_timestamp(),
        )
    )
    tx.execute(
        update(MemberRow)
        .where(MemberRow.attempt_id == ref.id, MemberRow.ended_at.is_(None))
        .values(ended_at=func.clock_timestamp(), exit=end.exit)
    )
    free_slots(tx, ref.id, device_state=device_state)
    return _move_job(tx, ref, end, backoff_s)


def _move_job(tx: Connection, ref: AttemptRef, end: End, backoff_s: float) -> JobState:
    past = past_ends(tx, ref.job_id)
    event, cause = next_event(end.verdict, past)
    data: dict[str, Any] = {"attempt": ref.number, "cause": end.verdict.cause}
    if end.evidence:
        data["evidence"] = end.evidence[:2000]
    if end.patch:
        data["patch"] = end.patch
    error: dict[str, Any] | None = None
    if event is JobEvent.FAIL:
        error = {"code": cause, "message": end.evidence[:2000] or f"The job ended: {cause}."}
        if end.patch:
            error["patch"] = end.patch
    pause = pause_s(event, past, backoff_s=backoff_s)
    if pause > 0:
        ended = f"attempt {ref.number} ended: {end.verdict.cause or end.verdict.outcome}"
        tx.execute(NOT_BEFORE, {"job": ref.job_id, "pause_s": pause, "ended": ended})
    state = apply_event(tx, ref.job_id, event, attempt_id=ref.id, data=data, error=error)
    if state in TERMINAL:
        settle_children(tx, ref.job_id, state)
    return state


# The scheduler looks at no job in its pause: what it waits for is said here.
NOT_BEFORE = text("""
    WITH pause AS (SELECT clock_timestamp() + make_interval(secs => :pause_s) AS ends_at)
    UPDATE jobs SET not_before = ends_at, wait_reason = 'tried again at '
        || to_char(ends_at AT TIME ZONE 'UTC', 'HH24:MI:SS') || ' UTC; ' || :ended
    FROM pause WHERE id = :job
""")


@dataclass(frozen=True)
class PastEnds:
    """What a job's ended attempts come to, the newest included."""

    charged: int
    uncharged: int
    workers_lost_in_a_row: int


PAST_ENDS = text("""
    SELECT a.charged, a.outcome,
           -- One that nobody had claimed took no worker along.
           a.cause = 'node_lost' AND EXISTS (
               SELECT 1 FROM members m WHERE m.attempt_id = a.id AND m.claimed_at IS NOT NULL
           ) AS lost_its_worker
    FROM attempts a WHERE a.job_id = :job AND a.ended_at IS NOT NULL
    ORDER BY a.number DESC
""")


def past_ends(tx: Connection, job_id: UUID) -> PastEnds:
    """Count a job's ended attempts by who is charged."""
    rows = tx.execute(PAST_ENDS, {"job": job_id}).all()
    lost = [row for row in rows if row.outcome == Outcome.LOST]
    lost_in_a_row = len(list(takewhile(lambda row: row.lost_its_worker, rows)))
    return PastEnds(sum(row.charged for row in rows), len(lost), lost_in_a_row)


def next_event(verdict: Verdict, past: PastEnds) -> tuple[JobEvent, Cause | None]:
    """What an ended attempt does to its job, with the cause if it is the job's end."""
    if verdict.outcome is Outcome.SUCCEEDED:
        return JobEvent.SUCCEED, None
    if verdict.outcome is Outcome.STOPPED:
        return JobEvent.STOP, None
    if verdict.outcome is Outcome.FAILED:
        tries_left = verdict.retry and past.charged < MAX_CHARGED
        return (JobEvent.RETRY, None) if tries_left else (JobEvent.FAIL, verdict.cause)
    if past.workers_lost_in_a_row >= MAX_LOST_WORKERS:
        return JobEvent.FAIL, Cause.POISON
    if past.uncharged >= MAX_UNCHARGED:
        return JobEvent.FAIL, verdict.cause
    return JobEvent.LOSE, None


def pause_s(event: JobEvent, past: PastEnds, *, backoff_s: float) -> float:
    """How long a job waits before its next try, in seconds.

    A charged retry waits twice as long each time; a first loss waits for nothing, later ones do.
    """
    if event is JobEvent.RETRY:
        return min(MAX_PAUSE_S, backoff_s * 2.0 ** (past.charged - 1))
    if event is JobEvent.LOSE and past.uncharged > 1:
        return min(MAX_PAUSE_S, backoff_s * 2.0 ** (past.uncharged - 2))
    return 0.0


def ask_to_stop(tx: Connection, job_id: UUID, reason: StopReason) -> UUID | None:
    """Note on a job's live attempt why it shall stop; the first reason but cancel stays.

    The job's row is held. Returns the attempt, or None where none lives.
    """
    return tx.execute(
        _asking(reason).where(AttemptRow.job_id == job_id).returning(AttemptRow.id)
    ).scalar_one_or_none()


def note_shutdown(tx: Connection, ref: AttemptRef) -> None:
    """The worker ends and stops this attempt; one that is over stays as it is."""
    asking = _asking(StopReason.SHUTDOWN)
    tx.execute(asking.where(AttemptRow.id == ref.id, AttemptRow.token == ref.token))


def _asking(reason: StopReason) -> Update:
    return (
        update(AttemptRow)
        .where(AttemptRow.ended_at.is_(None))
        .where(AttemptRow.stop_reason.is_(None) | (reason is StopReason.CANCEL))
        .values(stop_reason=reason.value, stop_asked_at=func.clock_timestamp())
    )


def nodes_of(tx: Connection, attempt_id: UUID) -> list[UUID]:
    """The nodes that an attempt lives on."""
    rows = tx.execute(
        select(MemberRow.node_id).where(
            MemberRow.attempt_id == attempt_id, MemberRow.ended_at.is_(None)
        )
    )
    return list(rows.scalars())


def note(tx: Connection, ref: AttemptRef, type_: str, data: dict[str, Any]) -> None:
    """Add a line about a live attempt to its job's timeline. Raises: StaleToken."""
    lock_job(tx, ref.job_id)
    check_token(tx, ref)
    record_event(tx, ref.job_id, type_, attempt_id=ref.id, data=data)


def refuse_write(tx: Connection, ref: AttemptRef, what: str) -> None:
    """Leave a line that a write of an attempt that is over was refused."""
    record_event(tx, ref.job_id, "write_refused", attempt_id=ref.id, data={"what": what})
