"""Submitting, cancelling and retrying jobs: what a person asks for."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, delete, func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import IntegrityError

from tuneyard.models.artifacts import check_base_name
from tuneyard.models.attempts import ask_to_stop, nodes_of
from tuneyard.models.dependencies import settle_children
from tuneyard.models.events import (
    apply_event,
    lock_job,
    node_channel,
    notify,
    record_submission,
)
from tuneyard.models.implied import IMPLIED, Work
from tuneyard.models.inputs import OUTPUTS, Inputs, complete, resolve
from tuneyard.models.tables import (
    DeviceRow,
    IdempotencyKeyRow,
    JobEdgeRow,
    JobRow,
)
from tuneyard.specs.download import DownloadSpec
from tuneyard.specs.errors import Conflict, NotFound
from tuneyard.specs.exits import StopReason
from tuneyard.specs.finetune import shapers_changed
from tuneyard.specs.ids import new_id, show_id
from tuneyard.specs.jobs import JobSpec, Note, read_spec
from tuneyard.specs.states import TERMINAL, JobEvent, JobState, next_state


@dataclass(frozen=True)
class Submission:
    """What a person asked for, checked as far as it can be without the database."""

    spec: JobSpec
    notes: tuple[Note, ...] = ()
    id: UUID = field(default_factory=new_id)
    pipeline_id: UUID | None = None
    retry_of: UUID | None = None
    kept: Inputs = field(default_factory=dict)  # inputs that are known by id already
    work_key: str | None = None  # of a system job: what it does


@dataclass(frozen=True)
class RequestKey:
    """The client's own name for a request (Idempotency-Key), and the hash of its body."""

    key: str
    body_sha256: str


def submit_job(tx: Connection, team_id: UUID, submission: Submission) -> Inputs:
    """Write a job with all that belongs to it; its inputs as far as they are there.

    Raises: InputError (a reference leads nowhere), Conflict (a download's name is taken).
    """
    spec = submission.spec
    if isinstance(spec, DownloadSpec) and spec.what == "model":
        check_base_name(tx, spec.model_name, spec.source)
    inputs = dict(resolve(tx, team_id, spec.references(), kept=submission.kept).inputs)
    for implied in IMPLIED:
        for field_, work in implied(spec, inputs).items():
            what = inputs.get(field_, {}).get("what", field_)
            job = _share(tx, team_id, work, priority=spec.priority)
            output = OUTPUTS[work.spec.kind]
            inputs[field_] = {"job": str(job), "output": output, "what": what}
    resolved = complete(tx, team_id, inputs)
    state = JobState.QUEUED if resolved.ready else JobState.BLOCKED
    tx.execute(
        insert(JobRow).values(
            id=submission.id,
            team_id=team_id,
            kind=spec.kind,
            name=spec.name or f"{spec.kind}-{submission.id.hex[-6:]}",
            spec=spec.document(),
            notes=[note.model_dump() for note in submission.notes],
            state=state.value,
            priority=spec.priority,
            demand=_demand(tx, spec),
            inputs=dict(resolved.inputs),
            wait_reason=resolved.wait_reason,
            pipeline_id=submission.pipeline_id,
            retry_of=submission.retry_of,
            system=submission.work_key is not None,
            work_key=submission.work_key,
        )
    )
    _write_edges(tx, team_id, submission.id, resolved.parents)
    record_submission(tx, submission.id, team_id, state)
    return resolved.inputs


def _share(tx: Connection, team_id: UUID, work: Work, *, priority: int) -> UUID:
    """The job that does this work or has done it; it is made where there is none.

    It waits no longer than a job of that priority that needs it.
    """
    _raise_priority(tx, team_id, work.key, priority)
    found = _doing(tx, team_id, work.key)
    if found is not None:
        return found
    spec = work.spec.model_copy(update={"priority": priority})
    submission = Submission(spec, kept=work.inputs, work_key=work.key)
    try:
        with tx.begin_nested():
            submit_job(tx, team_id, submission)
    except IntegrityError:
        found = _doing(tx, team_id, work.key)
        if found is None:
            raise
        return found  # another submission made it meanwhile
    return submission.id


def _raise_priority(tx: Connection, team_id: UUID, work_key: str, priority: int) -> None:
    """Before it is held by ``_doing``: two who hold a row and both change it would block."""
    waiting = JobRow.state.in_([JobState.QUEUED.value, JobState.BLOCKED.value])
    tx.execute(
        update(JobRow)
        .where(JobRow.team_id == team_id, JobRow.work_key == work_key, waiting)
        .where(JobRow.priority < priority)
        .values(priority=priority)
    )


def _doing(tx: Connection, team_id: UUID, work_key: str) -> UUID | None:
    same = select(JobRow.id).where(JobRow.team_id == team_id, JobRow.work_key == work_key)
    going = same.where(JobRow.state.not_in([JobState.FAILED.value, JobState.CANCELLED.value]))
    # Held, so that nobody cancels it before this submission is seen to need it.
    return tx.execute(going.with_for_update(read=True)).scalar_one_or_none()


def body_hash(body: bytes) -> str:
    """What tells two bodies under one Idempotency-Key apart."""
    return hashlib.sha256(body).hexdigest()


def take_key(
    tx: Connection, team_id: UUID, job_id: UUID, request: RequestKey | None
) -> UUID | None:
    """Write a request's key for the job that it will make; the job that it has made before, if any.

    Two at once: the second waits in the insert until the first has committed or rolled back.
    Raises: Conflict (the key was used with another body).
    """
    if request is None:
        return None
    same_key = (IdempotencyKeyRow.team_id == team_id, IdempotencyKeyRow.key == request.key)
    expired = IdempotencyKeyRow.expires < func.clock_timestamp()
    tx.execute(delete(IdempotencyKeyRow).where(*same_key, expired))
    row = insert(IdempotencyKeyRow).values(
        team_id=team_id, key=request.key, body_sha256=request.body_sha256, job_id=job_id
    )
    if tx.execute(row.on_conflict_do_nothing().returning(IdempotencyKeyRow.key)).one_or_none():
        return None
    earlier = tx.execute(
        select(IdempotencyKeyRow.job_id, IdempotencyKeyRow.body_sha256).where(*same_key)
    ).one()
    if earlier.body_sha256 != request.body_sha256:
        raise Conflict(
            "This Idempotency-Key was used with another body.",
            code="idempotency_conflict",
            field="Idempotency-Key",
            hint="use a new key for a new job",
        )
    found: UUID = earlier.job_id
    return found


def knows_key(tx: Connection, team_id: UUID, request: RequestKey) -> bool:
    """Whether a request with this key was accepted before; ``take_key`` judges its body."""
    row = select(IdempotencyKeyRow.key).where(
        IdempotencyKeyRow.team_id == team_id,
        IdempotencyKeyRow.key == request.key,
        IdempotencyKeyRow.expires >= func.clock_timestamp(),
    )
    return tx.execute(row).one_or_none() is not None


def _demand(tx: Connection, spec: JobSpec) -> dict[str, Any]:
    """What the job needs; ``auto`` is a GPU where the cluster has any, else a CPU."""
    kind = spec.device
    if kind == "auto" and not spec.wants_gpu:
        kind = "cpu"
    if kind == "auto":
        gpus = select(func.count()).where(DeviceRow.kind == "gpu", DeviceRow.state != "lost")
        kind = "gpu" if tx.execute(gpus).scalar_one() else "cpu"
    devices_each = spec.gpus if kind == "gpu" else 1
    return {
        "nodes": 1,
        "devices_each": devices_each,
        "kind": kind,
        "bytes_each": 0,
        "labels": {},
        "share": None,
    }


def _write_edges(
    tx: Connection, team_id: UUID, job_id: UUID, parents: Sequence[tuple[UUID, str]]
) -> None:
    edges = [
        {"team_id": team_id, "child": job_id, "parent": parent, "output": output}
        for parent, output in parents
    ]
    if edges:
        tx.execute(insert(JobEdgeRow), edges)


SERVES_THEM_ALONE = text("""
    SELECT DISTINCT p.id FROM job_edges e JOIN jobs p ON p.id = e.parent
    WHERE e.child = ANY (:jobs) AND p.id <> ALL (:jobs) AND p.system AND p.finished_at IS NULL
      AND NOT EXISTS (
          SELECT 1 FROM job_edges other JOIN jobs c ON c.id = other.child
          WHERE other.parent = p.id AND c.id <> ALL (:jobs) AND c.finished_at IS NULL)
""")


def _for_it_alone(tx: Connection, job_id: UUID) -> list[UUID]:
    """The open jobs that were made for this one, or for such a job, and for no other."""
    going = [job_id]
    while more := tx.execute(SERVES_THEM_ALONE, {"jobs": going}).scalars().all():
        going += more
    return sorted(going[1:])


def cancel_job(tx: Connection, job_id: UUID) -> JobState:
    """Cancel a job, at once or through its live attempt, and what was to be done for it alone.

    Raises: NotFound, Conflict.
    """
    for parent in _for_it_alone(tx, job_id):
        if next_state(lock_job(tx, parent).state, JobEvent.CANCEL) is not None:
            _cancel(tx, parent)
    job = lock_job(tx, job_id)
    if job.state in (JobState.CANCELLING, JobState.CANCELLED):
        return job.state
    if next_state(job.state, JobEvent.CANCEL) is None:
        raise Conflict(
            f"Job {show_id('job', job_id)} {job.state} already.",
            code="already_ended",
            hint="a job that has ended cannot be cancelled",
        )
    return _cancel(tx, job_id)


def _cancel(tx: Connection, job_id: UUID) -> JobState:
    state = apply_event(tx, job_id, JobEvent.CANCEL)
    # Whoever wants the same work from now on gets a job of its own.
    tx.execute(update(JobRow).where(JobRow.id == job_id).values(work_key=None))
    attempt = ask_to_stop(tx, job_id, StopReason.CANCEL)
    if attempt is not None:
        for node in nodes_of(tx, attempt):
            notify(tx, node_channel(node))
    if state in TERMINAL:
        settle_children(tx, job_id, state)
    return state


def cancel_pipeline(tx: Connection, pipeline_id: UUID) -> None:
    """Cancel whatever of a pipeline has not ended. Raises: NotFound, Conflict."""
    jobs = tx.execute(
        select(JobRow.id, JobRow.finished_at)
        .where(JobRow.pipeline_id == pipeline_id)
        .order_by(JobRow.id)
    ).all()
    if not jobs:
        raise NotFound("There is no such pipeline here.", field="pipeline")
    open_ = [job.id for job in jobs if job.finished_at is None]
    if not open_:
        raise Conflict(
            "All jobs of this pipeline have ended already.",
            code="already_ended",
            hint="a job that has ended cannot be cancelled",
        )
    for job_id in open_:
        if lock_job(tx, job_id).state not in TERMINAL:  # its parent's end may have taken it along
            cancel_job(tx, job_id)


def retry_job(tx: Connection, job_id: UUID, patch: Mapping[str, Any]) -> Submission:
    """The submission that tries an ended job again; from scratch where no checkpoint fits it.

    Raises: NotFound, Conflict, SpecRejected.
    """
    job = lock_job(tx, job_id)
    if job.state not in TERMINAL:
        raise Conflict(
            f"Job {show_id('job', job_id)} is {job.state}.",
            code="not_ended",
            hint="wait for its end, or cancel it first",
        )
    old = tx.execute(select(JobRow.spec, JobRow.inputs).where(JobRow.id == job_id)).one()
    spec, notes = read_spec(old.spec | dict(patch))
    changed = shapers_changed(read_spec(old.spec)[0], spec)
    if changed and not spec.from_scratch:
        spec = spec.model_copy(update={"from_scratch": True})
        said = f"no checkpoint of the origin fits another {', '.join(changed)}: it begins anew"
        notes = [*notes, Note(field="from_scratch", message=said)]
    kept = _kept_inputs(old.inputs, patch)
    return Submission(spec, tuple(notes), retry_of=job_id, kept=kept)


def _kept_inputs(inputs: Inputs, patch: Mapping[str, Any]) -> Inputs:
    """What a retry takes as its origin had it: the same bytes, whatever bears the name by now.

    A tuned model is named by one field and becomes two, so these change together; what other jobs
    prepare is found again by what it is.
    """
    changed = {*patch, "tokens"}
    if changed & {"model", "adapter"}:
        changed |= {name for name in inputs if name.startswith(("model", "adapter"))}
    return {name: value for name, value in inputs.items() if name not in changed}
