"""What the end of a job, or of a file's check, means for the jobs that wait for it."""

from collections import deque
from collections.abc import Mapping
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, select, text, update

from tuneyard.models.events import apply_event, lock_job
from tuneyard.models.inputs import Inputs, check_bases, complete
from tuneyard.models.tables import JobEdgeRow, JobRow
from tuneyard.specs.errors import InputError
from tuneyard.specs.exits import Cause
from tuneyard.specs.ids import show_id
from tuneyard.specs.jobs import JobSpec, read_spec
from tuneyard.specs.states import TERMINAL, JobEvent, JobState, next_state


def settle_children(tx: Connection, job_id: UUID, state: JobState) -> None:
    """A job ended: free those that waited for it, or end them too, through the whole graph."""
    ended = deque([(job_id, state)])
    while ended:
        parent, state = ended.popleft()
        for child in _children(tx, parent):
            after = (
                _reconsider(tx, child)
                if state is JobState.SUCCEEDED
                else _end_child(tx, child, parent, state)
            )
            if after in TERMINAL:
                ended.append((child, after))


def _children(tx: Connection, parent: UUID) -> list[UUID]:
    """Always in one order: two transactions that end two parents lock alike."""
    edges = select(JobEdgeRow.child).where(JobEdgeRow.parent == parent).distinct()
    return list(tx.execute(edges.order_by(JobEdgeRow.child)).scalars())


def _end_child(tx: Connection, child: UUID, parent: UUID, state: JobState) -> JobState | None:
    """None where the child has ended already, or may go on."""
    failed = state is JobState.FAILED
    event = JobEvent.INPUT_FAILED if failed else JobEvent.INPUT_CANCELLED
    if next_state(lock_job(tx, child).state, event) is None:
        return None
    error = None
    if failed:
        message = f"{show_id('job', parent)}, which this job needs, failed{_why(tx, parent)}"
        error = {"code": Cause.DEPENDENCY_FAILED.value, "message": message}
    return apply_event(tx, child, event, data={"parent": show_id("job", parent)}, error=error)


def _why(tx: Connection, parent: UUID) -> str:
    """The parent's own cause, which its child's owner may never have heard of; or a full stop."""
    error = tx.execute(select(JobRow.error).where(JobRow.id == parent)).scalar_one() or {}
    inherited = error.get("code") == Cause.DEPENDENCY_FAILED.value
    return "." if inherited or not error.get("message") else f": {error['message'][:500]}"


# All that a blocked job waits for has been decided; what a running parent's end decides is settled
# in that parent's own transaction, so this finds what was missed, and files that were checked.
DECIDED = text("""
    SELECT j.id FROM jobs j
    WHERE j.state = 'blocked'
      AND NOT EXISTS (
          SELECT 1 FROM job_edges e JOIN jobs p ON p.id = e.parent
          WHERE e.child = j.id AND p.finished_at IS NULL)
      AND NOT EXISTS (
          SELECT 1 FROM jsonb_each(j.inputs) input
          JOIN files f ON f.id = CAST(input.value ->> 'file' AS uuid)
          WHERE f.state NOT IN ('processed', 'rejected') AND f.deleted_at IS NULL)
    ORDER BY j.id LIMIT 500
""")


def decided_jobs(tx: Connection) -> list[UUID]:
    """Blocked jobs that need not wait any longer, whatever becomes of them."""
    return list(tx.execute(DECIDED).scalars())


WAITING_FOR_FILE = text("""
    SELECT j.id, j.spec, j.inputs FROM jobs j
    WHERE j.state = 'blocked' AND EXISTS (
        SELECT 1 FROM jsonb_each(j.inputs) input WHERE input.value ->> 'file' = :file)
    ORDER BY j.id
""")


def jobs_waiting_for_file(
    tx: Connection, file_id: UUID
) -> list[tuple[UUID, Mapping[str, Any], Inputs]]:
    """Blocked jobs that use a file: id, spec's document, inputs."""
    rows = tx.execute(WAITING_FOR_FILE, {"file": str(file_id)})
    return [(row.id, row.spec, row.inputs) for row in rows]


def reconsider(tx: Connection, job_id: UUID) -> None:
    """Look whether a blocked job's inputs are there by now, or can never be."""
    state = _reconsider(tx, job_id)
    if state is not None and state in TERMINAL:
        settle_children(tx, job_id, state)


def _reconsider(tx: Connection, job_id: UUID) -> JobState | None:
    """The state that a blocked job went to; None where it stays. Its children are not looked at."""
    job = lock_job(tx, job_id)
    if job.state is not JobState.BLOCKED:
        return None
    row = tx.execute(select(JobRow.spec, JobRow.inputs).where(JobRow.id == job_id)).one()
    try:
        resolved = complete(tx, job.team_id, row.inputs)
        check_bases(tx, job.team_id, spec_of(row.spec).references(), resolved.inputs)
    except InputError as problem:
        return apply_event(tx, job_id, JobEvent.INPUT_FAILED, error=problem.as_dict())
    changes = {"inputs": resolved.inputs, "wait_reason": resolved.wait_reason}
    tx.execute(update(JobRow).where(JobRow.id == job_id).values(changes))
    return apply_event(tx, job_id, JobEvent.INPUTS_READY) if resolved.ready else None


def refuse(tx: Connection, job_id: UUID, problem: InputError) -> None:
    """End a blocked job whose inputs can never serve it."""
    if lock_job(tx, job_id).state is not JobState.BLOCKED:
        return
    state = apply_event(tx, job_id, JobEvent.INPUT_FAILED, error=problem.as_dict())
    settle_children(tx, job_id, state)


def spec_of(document: Mapping[str, Any]) -> JobSpec:
    """The spec that ``jobs.spec`` holds."""
    spec, _ = read_spec(document)
    return spec
