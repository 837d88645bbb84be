"""What the end of a job, or of a file's check, means for the jobs that wait for it."""

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, select, update

from tuneyard.models.events import apply_event, lock_job
from tuneyard.models.inputs import resolve
from tuneyard.models.tables import JobEdgeRow, JobRow
from tuneyard.specs.errors import InputError
from tuneyard.specs.exits import Cause
from tuneyard.specs.ids import show_id
from tuneyard.specs.jobs import JobSpec, read_spec
from tuneyard.specs.states import JobEvent, JobState, next_state


def settle_children(tx: Connection, job_id: UUID, state: JobState) -> None:
    """A job ended: free those that waited for it, or end them too, through the whole graph."""
    children = tx.execute(
        select(JobEdgeRow.child).where(JobEdgeRow.parent == job_id).distinct()
    ).scalars()
    for child in children.all():
        if state is JobState.SUCCEEDED:
            reconsider(tx, child)
        else:
            _end_child(tx, child, job_id, state)


def _end_child(tx: Connection, child: UUID, parent: UUID, state: JobState) -> None:
    failed = state is JobState.FAILED
    event = JobEvent.INPUT_FAILED if failed else JobEvent.INPUT_CANCELLED
    if next_state(lock_job(tx, child).state, event) is None:
        return
    error = None
    if failed:
        message = f"{show_id('job', parent)}, which this job needs, failed."
        error = {"code": Cause.DEPENDENCY_FAILED.value, "message": message}
    ended = apply_event(tx, child, event, data={"parent": show_id("job", parent)}, error=error)
    settle_children(tx, child, ended)


def reconsider(tx: Connection, job_id: UUID) -> None:
    """Look whether a blocked job's inputs are there by now, or can never be."""
    if lock_job(tx, job_id).state is not JobState.BLOCKED:
        return
    spec = tx.execute(select(JobRow.spec).where(JobRow.id == job_id)).scalar_one()
    try:
        resolved = resolve(tx, spec_of(spec).references())
    except InputError as problem:
        refuse(tx, job_id, problem)
        return
    if resolved.ready:
        inputs = dict(resolved.inputs)
        tx.execute(
            update(JobRow).where(JobRow.id == job_id).values(inputs=inputs, wait_reason=None)
        )
        apply_event(tx, job_id, JobEvent.INPUTS_READY)


def refuse(tx: Connection, job_id: UUID, problem: InputError) -> None:
    """End a blocked job whose inputs can never serve it."""
    if lock_job(tx, job_id).state is not JobState.BLOCKED:
        return
    state = apply_event(tx, job_id, JobEvent.INPUT_FAILED, error=problem.as_dict())
    settle_children(tx, job_id, state)


def reconsider_blocked(tx: Connection) -> None:
    """Look at every blocked job that this transaction may see."""
    for job_id, _ in blocked_jobs(tx):
        reconsider(tx, job_id)


def blocked_jobs(tx: Connection) -> list[tuple[UUID, Mapping[str, Any]]]:
    """Every blocked job that this transaction may see, with its spec's document."""
    blocked = select(JobRow.id, JobRow.spec).where(JobRow.state == JobState.BLOCKED.value)
    return [(row.id, row.spec) for row in tx.execute(blocked.order_by(JobRow.id))]


def spec_of(document: Mapping[str, Any]) -> JobSpec:
    """The spec that ``jobs.spec`` holds."""
    spec, _ = read_spec(document)
    return spec
