"""Ways from the API through a node's gateway to a runner: one request each, one connection each.

Closing the connection is what cancels an answer, so there is no pool. h11 is the server's own
parser and is loaded already; a client library would add a tenth of a second to every start.
"""

import asyncio
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import h11

from tuneyard.models.serving import Listening, NotReady
from tuneyard.specs.errors import InputError, TuneyardError, Unavailable
from tuneyard.specs.ids import show_id

CONNECT_WITHIN_S = 3.0
SILENCE_S = 900.0
"""So long an answer may let its reader wait for the next word, the wait in line included."""

MAX_PASSAGES = 200
MAX_LINE_BYTES = 1024**2
PIECE_BYTES = 64 * 1024


class Busy(Unavailable):
    """Too many questions wait for this model already."""

    code = "busy"
    http_status = 429


class Passage:
    """One request and its answer's lines. Whoever opened it closes it."""

    def __init__(self, passages: "Passages") -> None:
        self._passages = passages
        self._connection = h11.Connection(our_role=h11.CLIENT)
        self._writer: asyncio.StreamWriter | None = None
        self._rest = b""

    async def ask(self, where: Listening, place: str, body: Mapping[str, Any]) -> None:
        """Send it, and wait until it is taken. Raises: what the runner or its gateway refuses."""
        url = urlsplit(where.gateway.url)
        port = url.port or (443 if url.scheme == "https" else 80)
        opening = asyncio.open_connection(url.hostname, port, ssl=url.scheme == "https" or None)
        content = json.dumps(body).encode()
        headers = [
            ("Host", url.netloc),
            ("Authorization", f"Bearer {where.gateway.token}"),
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(content))),
        ]
        target = f"{url.path}/attempts/{show_id('attempt', where.attempt)}/{place}"
        request = h11.Request(method="POST", target=target, headers=headers)
        try:
            self._reader, writer = await asyncio.wait_for(opening, CONNECT_WITHIN_S)
            self._writer = writer
            for event in (request, h11.Data(data=content), h11.EndOfMessage()):
                writer.write(self._connection.send(event) or b"")
            await writer.drain()
            answer = await self._event()
        except (OSError, TimeoutError):
            raise _away() from None
        if not isinstance(answer, h11.Response):
            raise _away()
        if answer.status_code >= 300:
            raise _refusal(answer.status_code, await self.line() or {})

    async def line(self) -> dict[str, Any] | None:
        """The next line of the answer; None at its end, or where it breaks off."""
        while b"\n" not in self._rest:
            try:
                event = await self._event()
            except (OSError, TimeoutError):
                return None
            if not isinstance(event, h11.Data):
                line, self._rest = self._rest, b""  # a refusal's body has no line's end
                return _object(line)
            self._rest += bytes(event.data)
            if len(self._rest) > MAX_LINE_BYTES:
                return None
        line, _, self._rest = self._rest.partition(b"\n")
        return _object(line)

    async def _event(self) -> Any:
        """The next of h11's events; None where the other side broke off."""
        while (event := self._next()) is h11.NEED_DATA:
            piece = await asyncio.wait_for(self._reader.read(PIECE_BYTES), SILENCE_S)
            self._connection.receive_data(piece)
        return event

    def _next(self) -> Any:
        try:
            return self._connection.next_event()
        except h11.RemoteProtocolError:
            return None

    def close(self) -> None:
        """Hang up: what is still being answered is cancelled by that."""
        if self._writer is not None:
            self._writer.close()
        self._passages.open -= 1


class Passages:
    """All that are open in this process."""

    def __init__(self) -> None:
        self.open = 0

    async def ask(self, where: Listening, place: str, body: Mapping[str, Any]) -> Passage:
        """Open one. Raises: Busy, NotReady, Unavailable, InputError; nothing is open then."""
        if self.open >= MAX_PASSAGES:
            raise Unavailable("Too many chats at once.", code="chats_busy")
        self.open += 1
        passage = Passage(self)
        try:
            await passage.ask(where, place, body)
        except BaseException:
            passage.close()
            raise
        return passage


def broken_off() -> Unavailable:
    """What an answer ends with whose runner ended before."""
    message = "The model's process broke off its answer."
    return Unavailable(message, code="runner_away", hint="ask again; the job is tried again")


def _away() -> Unavailable:
    message = "The gateway of the model's node cannot be reached."
    return Unavailable(message, code="gateway_away", hint="ask again; its worker may be restarting")


def _refusal(status: int, body: Mapping[str, Any]) -> TuneyardError:
    """The runner's or the gateway's refusal in this API's words."""
    error = body.get("error") or {}
    said = {name: error.get(name) for name in ("code", "field", "hint")}
    message = str(error.get("message") or f"The model's process answers {status}.")
    if status == 401:  # the token is of an earlier life of the worker
        return _away()
    if status == 410:
        return NotReady("The model is being stopped.", field="job", hint="ask again once it is")
    if status == 429:
        return Busy(message, hint=said["hint"])
    if status in (400, 411, 413, 422):
        return InputError(message, **said)
    return Unavailable(message, code=str(said["code"] or "runner_away"), hint=said["hint"])


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
