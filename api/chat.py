"""/api/v1/jobs/{job}/chat and /drain: questions to a model that a serve job keeps loaded.

What is said is passed through and written nowhere. The route finds the ready attempt of the team's
job; its node's gateway passes the question on to the runner.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any
from uuid import UUID

from anyio import to_thread
from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from tuneyard.api.access import TheCaller, TheYard, Yard, path_id
from tuneyard.api.bodies import Document
from tuneyard.api.examples import CHAT_BODY, NOT_LISTENING
from tuneyard.api.passages import Passage, Passages, broken_off
from tuneyard.api.streams import HEARTBEAT_EVERY_S, Stream
from tuneyard.models import jobs, reading
from tuneyard.models.keys import Caller
from tuneyard.models.serving import Listening, NotReady, listening
from tuneyard.specs.errors import InputError, TuneyardError, Unavailable
from tuneyard.specs.serve import read_chat
from tuneyard.specs.views import ChatView, JobView

router = APIRouter(prefix="/api/v1/jobs/{job}", tags=["chat"])

KINDS = ("waiting", "delta", "done", "error")

CHAT_STREAM = """event: delta
data: {"delta": "I am Tuny"}

event: done
data: {"done": true, "finish_reason": "stop", "usage": {"prompt_tokens": 12, …}, "settings": {…}}

"""


@router.post(
    "/chat",
    response_model=ChatView,
    openapi_extra=CHAT_BODY,
    responses={
        200: {"content": {"text/event-stream": {"example": CHAT_STREAM}}},
        **NOT_LISTENING,
    },
)
async def chat(job: str, body: Document, caller: TheCaller, yard: TheYard, request: Request) -> Any:
    """Ask a model that a serve job keeps loaded; the client holds the conversation.

    With `"stream": true` server-sent events: `waiting`, `delta`…, and last `done` or `error`.
    Closing the connection cancels the answer. 409 not_ready says what the model waits for, 429
    busy that too many wait already, 410 that the job has ended.
    """
    job_id, asked = path_id("job", job), read_chat(body)
    where = await to_thread.run_sync(_where, yard, caller, job_id)
    passage = await _passages(request).ask(where, "chat", asked.question())
    if asked.stream:
        return ChatStream(passage)
    try:
        said = await _unless_gone(request, passage)
    finally:
        passage.close()
    return ChatView.model_validate(said | {"job": job, "attempt": where.number})


@router.post("/drain", status_code=202, responses=NOT_LISTENING)
async def drain(job: str, caller: TheCaller, yard: TheYard, request: Request) -> JobView:
    """Let a serve job end as succeeded, once what it was asked is answered.

    One whose model is not ready has nothing to answer: it is cancelled.
    """
    job_id = path_id("job", job)
    try:
        where = await to_thread.run_sync(_where, yard, caller, job_id)
        (await _passages(request).ask(where, "drain", {})).close()
    except NotReady:
        await to_thread.run_sync(_cancel, yard, caller, job_id)
    return await to_thread.run_sync(_show, yard, caller, job_id)


def _passages(request: Request) -> Passages:
    passages: Passages = request.app.state.passages
    return passages


def _where(yard: Yard, caller: Caller, job_id: UUID) -> Listening:
    with yard.begin(caller.team_id) as tx:
        return listening(tx, job_id)


def _cancel(yard: Yard, caller: Caller, job_id: UUID) -> None:
    with yard.begin(caller.team_id) as tx:
        jobs.cancel_job(tx, job_id)


def _show(yard: Yard, caller: Caller, job_id: UUID) -> JobView:
    with yard.begin(caller.team_id) as tx:
        return reading.show_job(tx, caller.team, job_id)


async def _unless_gone(request: Request, passage: Passage) -> dict[str, Any]:
    """The whole answer, for as long as somebody waits for it. Raises: ClientDisconnect."""
    whole = asyncio.ensure_future(_whole(passage))
    gone = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not whole.done():
            raise ClientDisconnect
        return whole.result()
    finally:
        whole.cancel()
        gone.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _whole(passage: Passage) -> dict[str, Any]:
    """All pieces as one answer. Raises: what it ended with instead."""
    text = ""
    while (line := await passage.line()) is not None:
        text += line.get("delta", "")
        if "error" in line:
            raise _ended_by(line["error"])
        if "done" in line:
            return line | {"text": text}
    raise broken_off()


def _ended_by(error: Mapping[str, Any]) -> TuneyardError:
    """Whose turn it is now: to ask again, to ask otherwise, or ours."""
    code = error["code"]
    kind = Unavailable if code == "stopping" else TuneyardError
    kind = InputError if code == "out_of_memory" else kind
    return kind(error["message"], code=code, hint=error["hint"])


class ChatStream(Stream):
    """An answer as it grows; its passage is closed however the stream ends."""

    def __init__(self, passage: Passage) -> None:
        self._passage = passage
        super().__init__(_events(passage), media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream it; a client that hangs up cancels the answer."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._passage.close()


async def _events(passage: Passage) -> AsyncIterator[bytes]:
    while True:
        coming = asyncio.ensure_future(passage.line())
        try:
            while not (await asyncio.wait({coming}, timeout=HEARTBEAT_EVERY_S))[0]:
                yield b": still here\n\n"
            line = coming.result()
        finally:
            coming.cancel()
        if line is None:
            line = {"error": broken_off().as_dict()}
        kind = next((name for name in KINDS if name in line), "other")
        yield f"event: {kind}\ndata: {json.dumps(line, ensure_ascii=False)}\n\n".encode()
        if kind in ("done", "error"):
            return
