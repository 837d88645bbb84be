"""/api/v1/jobs: submit, list, show, cancel, retry. Check, one transaction, a view."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from sqlalchemy import Connection

from tuneyard.api.access import TheCaller, TheYard, Yard, path_id
from tuneyard.api.bodies import Document, IdempotencyKey
from tuneyard.api.examples import BAD_REQUEST, CONFLICT, RETRY_BODY, SUBMIT_BODY
from tuneyard.api.paging import Cursor, page, read_cursor
from tuneyard.api.submissions import check_inputs
from tuneyard.checks.hubs import ask_hubs
from tuneyard.models import jobs, reading
from tuneyard.models.inputs import knows_model
from tuneyard.models.keys import Caller
from tuneyard.specs.download import DownloadSpec, implied_download
from tuneyard.specs.errors import InputError, SpecRejected
from tuneyard.specs.ids import new_id
from tuneyard.specs.jobs import KINDS, JobSpec, Note, as_written, read_spec
from tuneyard.specs.pipelines import Step, in_step, read_pipeline
from tuneyard.specs.states import JobState
from tuneyard.specs.views import JobList, JobView, PipelineView

router = APIRouter(prefix="/api/v1/jobs", tags=["jobs"])
pipelines = APIRouter(prefix="/api/v1/pipelines", tags=["pipelines"])


@router.post("", status_code=201, openapi_extra=SUBMIT_BODY, responses={**BAD_REQUEST, **CONFLICT})
def submit(
    body: Document, caller: TheCaller, yard: TheYard, response: Response, key: IdempotencyKey
) -> JobView | PipelineView:
    """Submit a job, or a pipeline of jobs: all of them or none.

    Once this answers 201 it is on disk and will run. Asked again with the same Idempotency-Key
    and body it answers the same job, with the header `Idempotency-Replayed: true`.
    """
    try:
        return _accept(body, caller, yard, response, _request_key(key, body))
    except InputError as error:
        raise as_written(body, error) from None


def _accept(
    body: Mapping[str, Any],
    caller: Caller,
    yard: Yard,
    response: Response,
    request: jobs.RequestKey | None,
) -> JobView | PipelineView:
    # Hubs are not asked again of what was accepted: their answer may be another by now.
    replayed = _is_replayed(yard, caller, request)
    if "pipeline" in body:
        steps = read_pipeline(body, remote_code=yard.settings.trust_remote_code)
        if not replayed:
            steps = [_asked_of_hubs(yard, caller, step) for step in steps]
        with yard.begin(caller.team_id) as tx:
            return _submit_pipeline(tx, yard, caller, steps, request, response)
    spec, notes = read_spec(body, remote_code=yard.settings.trust_remote_code)
    if not replayed:
        notes = [*notes, *_hubs_notes(yard, caller, spec)]
    submission = jobs.Submission(spec, tuple(notes))
    with yard.begin(caller.team_id) as tx:
        return _submit(tx, yard, caller, submission, request, response)


def _is_replayed(yard: Yard, caller: Caller, request: jobs.RequestKey | None) -> bool:
    if request is None:
        return False
    with yard.snapshot(caller.team_id) as tx:
        return jobs.knows_key(tx, caller.team_id, request)


def _asked_of_hubs(yard: Yard, caller: Caller, step: Step) -> Step:
    try:
        return replace(step, notes=(*step.notes, *_hubs_notes(yard, caller, step.spec)))
    except InputError as error:
        raise in_step(step.position, error) from None


def _hubs_notes(yard: Yard, caller: Caller, spec: JobSpec) -> list[Note]:
    """What hubs say of what a job makes download, asked before its transaction begins.

    Raises: SpecRejected where no hub has it.
    """
    if isinstance(spec, DownloadSpec):
        return ask_hubs(spec, yard.settings.hubs, os.environ)
    notes: list[Note] = []
    for reference in spec.references():
        download = isinstance(reference.value, str) and implied_download(reference.value)
        if reference.what not in ("model", "base") or not download:
            continue
        with yard.snapshot(caller.team_id) as tx:
            if knows_model(tx, caller.team_id, str(reference.value)):
                continue
        try:
            notes += ask_hubs(download, yard.settings.hubs, os.environ)
        except SpecRejected as error:
            error.field = error.problems[0].field = reference.field
            raise
    return notes


def _request_key(key: str | None, body: object) -> jobs.RequestKey | None:
    """A body counts by what it says, however its names are ordered and spaced."""
    if key is None:
        return None
    return jobs.RequestKey(key, jobs.body_hash(json.dumps(body, sort_keys=True).encode()))


def _submit(
    tx: Connection,
    yard: Yard,
    caller: Caller,
    submission: jobs.Submission,
    request: jobs.RequestKey | None,
    response: Response,
) -> JobView:
    earlier = jobs.take_key(tx, caller.team_id, submission.id, request)
    if earlier is None:
        inputs = jobs.submit_job(tx, caller.team_id, submission)
        check_inputs(tx, yard, submission.spec, inputs)
    else:
        # Its inputs may be gone by now; the job that was made then is shown as it stands.
        response.headers["Idempotency-Replayed"] = "true"
    view = reading.show_job(tx, caller.team, earlier or submission.id)
    response.headers["Location"] = f"/api/v1/jobs/{view.id}"
    return view


def _submit_pipeline(
    tx: Connection,
    yard: Yard,
    caller: Caller,
    steps: Sequence[Step],
    request: jobs.RequestKey | None,
    response: Response,
) -> PipelineView:
    pipeline_id = new_id()
    earlier = jobs.take_key(tx, caller.team_id, steps[0].id, request)
    if earlier is None:
        for step in steps:
            submission = jobs.Submission(step.spec, step.notes, step.id, pipeline_id)
            try:
                inputs = jobs.submit_job(tx, caller.team_id, submission)
                check_inputs(tx, yard, step.spec, inputs)
            except InputError as error:
                raise in_step(step.position, error) from None
    else:
        response.headers["Idempotency-Replayed"] = "true"
        pipeline_id = reading.pipeline_of(tx, earlier)
    view = reading.show_pipeline(tx, caller.team, pipeline_id)
    response.headers["Location"] = f"/api/v1/pipelines/{view.id}"
    return view


@router.get("")
def list_jobs(
    caller: TheCaller,
    yard: TheYard,
    state: Annotated[list[str] | None, Query(description="Repeat it or part by commas.")] = None,
    kind: str | None = None,
    name: str | None = None,
    all_: Annotated[
        bool, Query(alias="all", description="Also those made for other jobs.")
    ] = False,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Cursor = None,
) -> JobList:
    """A page of the team's jobs, newest first."""
    if kind is not None and kind not in KINDS:
        message = f"There is no kind {kind[:40]!r}."
        hint = f"one of {', '.join(KINDS)}"
        raise InputError(message, code="bad_choice", field="kind", hint=hint)
    wanted = reading.JobFilter(_states(state or []), kind, name, None if all_ else False)
    listing = ("jobs", caller.team_id.hex, [*wanted.states], kind, name, all_)
    before = read_cursor(cursor, *listing)
    with yard.snapshot(caller.team_id) as tx:
        rows = reading.list_jobs(tx, caller.team, wanted, before=before, limit=limit + 1)
    shown, next_cursor = page(rows, limit, *listing)
    return JobList(data=shown, next_cursor=next_cursor)


def _states(asked: list[str]) -> list[JobState]:
    names = [name for text in asked for name in text.split(",") if name]
    unknown = [name for name in names if name not in list(JobState)]
    if unknown:
        message = f"There is no state {unknown[0][:40]!r}."
        hint = f"one of {', '.join(JobState)}"
        raise InputError(message, code="bad_choice", field="state", hint=hint)
    return sorted({JobState(name) for name in names})


@router.get("/{job}")
def show(job: str, caller: TheCaller, yard: TheYard) -> JobView:
    """One job, with its attempts, progress and reason for waiting."""
    job_id = path_id("job", job)
    with yard.snapshot(caller.team_id) as tx:
        return reading.show_job(tx, caller.team, job_id)


@router.post("/{job}/cancel", responses=CONFLICT)
def cancel(job: str, caller: TheCaller, yard: TheYard) -> JobView:
    """Cancel a job; a running one is stopped at a checkpoint. Asking twice is asking once."""
    job_id = path_id("job", job)
    with yard.begin(caller.team_id) as tx:
        jobs.cancel_job(tx, job_id)
        return reading.show_job(tx, caller.team, job_id)


@pipelines.get("/{pipeline}")
def show_pipeline(pipeline: str, caller: TheCaller, yard: TheYard) -> PipelineView:
    """A pipeline with its jobs, each after those that it needs."""
    pipeline_id = path_id("pipeline", pipeline)
    with yard.snapshot(caller.team_id) as tx:
        return reading.show_pipeline(tx, caller.team, pipeline_id)


@pipelines.post("/{pipeline}/cancel")
def cancel_pipeline(pipeline: str, caller: TheCaller, yard: TheYard) -> PipelineView:
    """Cancel all jobs of a pipeline that have not ended."""
    pipeline_id = path_id("pipeline", pipeline)
    with yard.begin(caller.team_id) as tx:
        jobs.cancel_pipeline(tx, pipeline_id)
        return reading.show_pipeline(tx, caller.team, pipeline_id)


@router.post(
    "/{job}/retry",
    status_code=201,
    openapi_extra=RETRY_BODY,
    responses={**BAD_REQUEST, **CONFLICT},
)
def retry(
    job: str,
    body: Document,
    caller: TheCaller,
    yard: TheYard,
    response: Response,
    key: IdempotencyKey,
) -> JobView:
    """Try an ended job again, as a new job, from its newest checkpoint unless from_scratch."""
    job_id, patch = path_id("job", job), _patch(body)
    with yard.begin(caller.team_id) as tx:
        again = jobs.retry_job(tx, job_id, patch)
        request = _request_key(key, [job, body])
        return _submit(tx, yard, caller, again, request, response)


def _patch(body: Mapping[str, Any]) -> dict[str, Any]:
    """What changes in the spec. Raises: InputError."""
    expected = {"patch": dict, "from_scratch": bool}
    for name, value in body.items():
        if name not in expected:
            hint = '{"patch": {…}, "from_scratch": true} is expected'
            message = f"There is no field {name[:60]!r}."
            raise InputError(message, code="unknown_field", field=name[:60], hint=hint)
        if not isinstance(value, expected[name]):
            wanted = "an object" if expected[name] is dict else "true or false"
            raise InputError(f"{name} must be {wanted}.", code="wrong_type", field=name)
    return dict(body.get("patch", {})) | {"from_scratch": body.get("from_scratch", False)}
