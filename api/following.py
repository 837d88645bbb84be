"""/api/v1/jobs/{job}/events, metrics, samples, logs: what happened so far, and what happens now."""

import re
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import StreamingResponse

from tuneyard.api.access import TheCaller, TheYard, path_id
from tuneyard.api.examples import BAD_REQUEST
from tuneyard.api.logs import LogReader
from tuneyard.api.ranges import PARTS, part_of
from tuneyard.api.streams import Stream
from tuneyard.models import logs, reading
from tuneyard.specs.errors import InputError
from tuneyard.specs.views import EventList, MetricList, SampleList
from tuneyard.store.shelves import begun

router = APIRouter(prefix="/api/v1/jobs/{job}", tags=["following"])

MAX_NUMBER = 2**62
PLAIN = "text/plain; charset=utf-8"

EVENT_STREAM = """id: 3
event: started
data: {"seq":3,"type":"started","from_state":"dispatched","to_state":"running","attempt":1,…}

event: progress
data: {"state":"running","attempt":1,"progress":{"done":40,"total":120,"unit":"steps","eta_s":92.5}}

"""


class BadEventId(InputError):
    """Last-Event-ID is not the number of an event of this job."""

    code = "bad_event_id"
    http_status = 400


@router.get(
    "/events",
    response_model=EventList,
    responses={
        200: {"content": {"text/event-stream": {"example": EVENT_STREAM}}},
        **BAD_REQUEST,
    },
)
def events(
    job: str,
    caller: TheCaller,
    yard: TheYard,
    request: Request,
    after: Annotated[int, Query(ge=0, le=MAX_NUMBER, description="Events after this one.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
    accept: Annotated[str, Header(description="`text/event-stream` follows the job.")] = "",
    last_event_id: Annotated[str | None, Header(alias="Last-Event-ID")] = None,
) -> Any:
    """A job's timeline.

    After `after`, or Last-Event-ID where that is given. With `Accept: text/event-stream` as it
    happens, to the job's end; between the numbered events come `progress` events without a number.
    """
    job_id = path_id("job", job)
    with yard.snapshot(caller.team_id) as tx:
        standing = reading.standing(tx, job_id)
        if last_event_id is not None:
            after = _event_number(last_event_id, standing.last_seq)
        if "text/event-stream" in accept:
            stream = request.app.state.streams.events(caller, job_id, after)
            return Stream(stream, media_type="text/event-stream")
        lines = reading.list_events(tx, job_id, after=after, limit=limit)
    more = bool(lines) and lines[-1].seq < standing.last_seq
    return EventList(data=lines, next_cursor=str(lines[-1].seq) if more else None)


def _event_number(text: str, last_seq: int) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) > last_seq:
        raise BadEventId(field="Last-Event-ID", hint=f"this job's events are 1 to {last_seq}")
    return int(text)


@router.get("/metrics")
def metrics(
    job: str,
    caller: TheCaller,
    yard: TheYard,
    name: Annotated[list[str] | None, Query(description="Repeat it for several.")] = None,
    attempt: Annotated[
        int | None, Query(ge=1, le=10_000, description="Only this attempt's.")
    ] = None,
    after: Annotated[int, Query(ge=-1, le=MAX_NUMBER, description="Steps after this one.")] = -1,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> MetricList:
    """What was measured, by step; a step that was done again counts as the newest attempt did it.

    The page after this one begins with `after` = next_cursor.
    """
    job_id = path_id("job", job)
    wanted = reading.MetricFilter(name or (), attempt)
    with yard.begin(caller.team_id) as tx:
        reading.standing(tx, job_id)
        points = reading.list_metrics(tx, job_id, wanted, after=after, limit=limit + 1)
    more, points = len(points) > limit, points[:limit]
    return MetricList(data=points, next_cursor=str(points[-1].step) if more else None)


@router.get("/samples")
def samples(
    job: str,
    caller: TheCaller,
    yard: TheYard,
    after: Annotated[int, Query(ge=-1, le=MAX_NUMBER)] = -1,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> SampleList:
    """What the model answered to `watch_prompts`, by step: the base at step 0, then checkpoints.

    The page after this one begins with `after` = next_cursor.
    """
    job_id = path_id("job", job)
    with yard.begin(caller.team_id) as tx:
        reading.standing(tx, job_id)
        points = reading.list_samples(tx, job_id, after=after, limit=limit + 1)
    more, points = len(points) > limit, points[:limit]
    return SampleList(data=points, next_cursor=str(points[-1].step) if more else None)


@router.get(
    "/logs",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"text/plain": {"example": "step 40 loss 1.83\n"}}},
        **PARTS,
    },
)
def job_logs(
    job: str,
    caller: TheCaller,
    yard: TheYard,
    request: Request,
    attempt: Annotated[
        int | None, Query(ge=1, le=10_000, description="Only this attempt's.")
    ] = None,
    tail: Annotated[int | None, Query(ge=0, le=100_000, description="Only the last lines.")] = None,
    start: Annotated[
        int | None, Query(ge=0, le=MAX_NUMBER, description="From this byte on.")
    ] = None,
    follow: Annotated[bool, Query(description="As it grows, to the job's end.")] = False,
    range_: Annotated[str | None, Header(alias="Range")] = None,
) -> StreamingResponse:
    """The log of all attempts, or of one: a Range of its bytes, its last lines, or as it grows.

    A broken `follow` goes on with `start`: X-Log-Start of the first answer, and the bytes since.
    """
    job_id = path_id("job", job)
    reader = LogReader(yard.db, yard.store, caller.team_id)
    with yard.begin(caller.team_id) as tx:
        reading.standing(tx, job_id)
        pieces, position = logs.lay_out(tx, job_id, attempt=attempt)
    total = sum(piece.length for piece in pieces)
    first = min(start or 0, total)
    if tail is not None:
        first = max(first, logs.last_lines(reader.read, pieces, tail))
    part = part_of(None if follow else range_, total, first=first)
    wanted = list(logs.cut(pieces, part.first, part.last))

    content = begun(reader.content(wanted))
    if follow:
        stream = request.app.state.streams.log(caller, job_id, attempt, content, position)
        return Stream(stream, media_type=PLAIN, headers={"X-Log-Start": str(first)})
    return StreamingResponse(content, part.status, part.headers, media_type=PLAIN)
