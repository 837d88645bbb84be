"""/api/v1/jobs: submit, list, show, cancel, retry. Check, one transaction, a view."""

import json
from collections.abc import Mapping
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Response
from sqlalchemy import Connection

from tuneyard.api.access import TheCaller, TheYard, Yard, path_id
from tuneyard.api.bodies import Document, IdempotencyKey
from tuneyard.api.examples import RETRY_BODY, SUBMIT_BODY
from tuneyard.api.paging import page, read_cursor
from tuneyard.checks.submission import check_finetune, check_prompts, check_serve
from tuneyard.models import files, jobs, reading
from tuneyard.models.inputs import resolve
from tuneyard.models.keys import Caller
from tuneyard.specs.errors import InputError, SpecRejected
from tuneyard.specs.finetune import FinetuneSpec
from tuneyard.specs.jobs import JobSpec, read_spec
from tuneyard.specs.serve import ServeSpec
from tuneyard.specs.states import JobState
from tuneyard.specs.views import JobList, JobView

router = APIRouter(prefix="/api/v1/jobs", tags=["jobs"])


@router.post("", status_code=201, openapi_extra=SUBMIT_BODY)
def submit(
    body: Document, caller: TheCaller, yard: TheYard, response: Response, key: IdempotencyKey
) -> JobView:
    """Submit a job. Once this answers 201 it is on disk and will run.

    Asked again with the same Idempotency-Key and body it answers the same job, with the header
    `Idempotency-Replayed: true`.
    """
    if "pipeline" in body:
        message = "Pipelines are not there yet."
        hint = 'submit the jobs one by one; {"from": "job_…"} makes one wait for another'
        raise InputError(message, code="not_supported_yet", field="pipeline", hint=hint)
    spec, notes = read_spec(body)
    submission = jobs.Submission(spec, tuple(notes), key, _digest(body))
    with yard.begin(caller.team_id) as tx:
        return _submit(tx, yard, caller, submission, response)


def _digest(value: object) -> str:
    """The hash of a body by what it says, however its names are ordered and spaced."""
    return jobs.body_hash(json.dumps(value, sort_keys=True).encode())


def _submit(
    tx: Connection, yard: Yard, caller: Caller, submission: jobs.Submission, response: Response
) -> JobView:
    job_id, replayed = jobs.submit_job(tx, caller.team_id, submission)
    if replayed:
        # Its inputs may be gone by now: the first answer holds all the same.
        response.headers["Idempotency-Replayed"] = "true"
    else:
        check_submission(tx, yard, submission.spec)
    view = reading.show_job(tx, caller.team, job_id)
    response.headers["Location"] = f"/api/v1/jobs/{view.id}"
    return view


def check_submission(tx: Connection, yard: Yard, spec: JobSpec) -> None:
    """What the data's reports and the base's headers rule out. Raises: SpecRejected."""
    inputs = resolve(tx, spec.references()).inputs
    problems: list[InputError] = []
    if isinstance(spec, FinetuneSpec):
        base = inputs.get("model", {}).get("base_model")
        facts = yard.facts(UUID(base)) if base else None
        report, eval_report = (_report(tx, inputs, name) for name in ("dataset", "eval_dataset"))
        problems = check_finetune(spec, report, facts, eval_report=eval_report)
    elif isinstance(spec, ServeSpec) and "adapter" not in inputs:
        base = inputs.get("model", {}).get("base_model")
        problems = check_serve(spec, yard.facts(UUID(base)) if base else None)
    elif report := _report(tx, inputs, "prompts"):
        problems = check_prompts(report)
    if problems:
        raise SpecRejected(problems)


def _report(
    tx: Connection, inputs: Mapping[str, Mapping[str, str]], field: str
) -> Mapping[str, Any] | None:
    file = inputs.get(field, {}).get("file")
    return files.report_of(tx, UUID(file)) if file else None


@router.get("")
def list_jobs(
    caller: TheCaller,
    yard: TheYard,
    state: Annotated[list[str] | None, Query(description="Repeat it or part by commas.")] = None,
    kind: str | None = None,
    name: str | None = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: str | None = None,
) -> JobList:
    """A page of the team's jobs, newest first."""
    wanted = reading.JobFilter(_states(state or []), kind, name)
    listing = ("jobs", caller.team_id.hex, [*wanted.states], kind, name)
    before = read_cursor(cursor, *listing)
    with yard.begin(caller.team_id) as tx:
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
    with yard.begin(caller.team_id) as tx:
        return reading.show_job(tx, caller.team, job_id)


@router.post("/{job}/cancel")
def cancel(job: str, caller: TheCaller, yard: TheYard) -> JobView:
    """Cancel a job; a running one is stopped at a checkpoint. Asking twice is asking once."""
    job_id = path_id("job", job)
    with yard.begin(caller.team_id) as tx:
        jobs.cancel_job(tx, job_id)
        return reading.show_job(tx, caller.team, job_id)


@router.post("/{job}/retry", status_code=201, openapi_extra=RETRY_BODY)
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
        digest = _digest([job, body])
        submission = jobs.Submission(again.spec, again.notes, key, digest, again.retry_of)
        return _submit(tx, yard, caller, submission, response)


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
