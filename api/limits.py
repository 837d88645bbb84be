"""What is cut off before a route sees it: bodies, encodings, types and addresses of odd size.

The outermost layer: it also gives each answer its x-request-id, and turns a bug into a plain 500.
"""

import asyncio
import logging
import re
import sys
import time
from collections.abc import Sequence
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tuneyard.api.prefix import inner_path
from tuneyard.api.problems import answer, internal
from tuneyard.specs.errors import InputError, Unavailable

log = logging.getLogger(__name__)

MAX_TARGET_BYTES = 8 * 1024
MAX_HEADERS = 100
MAX_HEADER_BYTES = 32 * 1024
FORM_BYTES = 64 * 1024
"""What a form may hold, and a multipart body besides its file."""

UPLOADS = "/api/v1/files"
FORMS = frozenset({"/flower/login", "/flower/logout", "/flower/tasks/datatable"})
"""Where a browser's forms are taken; /api/ never takes one."""

DRAINED_BYTES, DRAINED_S = 8 * 1024**2, 2.0
"""Of a refused body so much is read and thrown away: a connection that is closed over unread bytes
is reset, and many clients then never see the answer."""

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
CONTROL = re.compile("[\x00-\x1f\x7f]")


class BodyTooLarge(InputError):
    """The body is larger than this route takes."""

    code = "body_too_large"
    http_status = 413


class TargetTooLong(InputError):
    """The address is too long."""

    code = "uri_too_long"
    http_status = 414


class HeadersTooLarge(InputError):
    """The headers are too large or too many."""

    code = "headers_too_large"
    http_status = 431


class Unsupported(InputError):
    """The body is of a kind that is not taken."""

    code = "unsupported_media_type"
    http_status = 415


class Limits:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, max_file_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._max_upload_bytes = max_file_bytes + FORM_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on with a body that is counted as it comes."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send)
        try:
            await self._serve(scope, exchange)
        except ClientDisconnect:
            pass  # nobody is there to be answered
        except Unavailable as error:
            if exchange.status is None:
                await answer(error)(scope, exchange.receive, exchange.send)
            else:
                fields = exchange.named("answer_cut_off") | {"code": error.code}
                log.warning("answer cut off", extra=fields)
                raise  # the server cuts the connection
        except Exception:
            log.exception("internal error", extra=exchange.named("internal_error"))
            if exchange.status is None:
                await internal(exchange.id)(scope, exchange.receive, exchange.send)
            else:
                raise  # half an answer is out: the server cuts the connection
        finally:
            exchange.log()

    async def _serve(self, scope: Scope, exchange: "_Exchange") -> None:
        headers = Headers(scope=scope)
        limit = self._limit(inner_path(scope))
        problem = _bad_head(scope, headers) or _bad_body(scope, headers, limit)
        if problem is not None:
            await answer(problem)(scope, exchange.receive, exchange.send)
            return
        exchange.limit = limit
        await self._app(scope, exchange.receive, exchange.send)

    def _limit(self, path: str) -> int:
        if path == UPLOADS:
            return self._max_upload_bytes
        return FORM_BYTES if path in FORMS else self._max_body_bytes


class _Exchange:
    """A request and what became of it."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        self.id = given if REQUEST_ID.fullmatch(given) else uuid4().hex
        self.status: int | None = None
        self.limit = sys.maxsize
        self._scope, self._receive, self._send = scope, receive, send
        self._seen_bytes, self._body_left = 0, _has_body(headers)
        self._began = time.monotonic()

    async def receive(self) -> Message:
        """The next of the request's body. Raises: BodyTooLarge."""
        message = await self._receive()
        self._seen_bytes += len(message.get("body", b""))
        self._body_left = self._body_left and message.get("more_body", False)
        if self._seen_bytes > self.limit and self.status is None:
            raise BodyTooLarge(hint=f"at most {self.limit} bytes")
        return message

    async def send(self, message: Message) -> None:
        """The next of the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.id
            if self._body_left:
                headers["connection"] = "close"
        elif self._body_left and not message.get("more_body"):
            await self._send({**message, "more_body": True})
            await self._drain()
            message = {"type": "http.response.body"}
        await self._send(message)

    async def _drain(self) -> None:
        enough = self._seen_bytes + DRAINED_BYTES
        try:
            async with asyncio.timeout(DRAINED_S):
                while self._body_left and self._seen_bytes < enough:
                    await self.receive()
        except TimeoutError:
            pass

    def named(self, event: str) -> dict[str, object]:
        method, path = self._scope["method"], inner_path(self._scope)
        return {"event": event, "request": self.id, "method": method, "path": path}

    def log(self) -> None:
        """One line a request; those that only looked and were served are for debugging."""
        quiet = self._scope["method"] == "GET" and self.status is not None and self.status < 400
        ms = round(1000 * (time.monotonic() - self._began))
        extra = self.named("request") | {"status": self.status, "ms": ms}
        log.log(logging.DEBUG if quiet else logging.INFO, "request", extra=extra)


def _bad_head(scope: Scope, headers: Headers) -> InputError | None:
    if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_TARGET_BYTES:
        return TargetTooLong(hint=f"at most {MAX_TARGET_BYTES} bytes")
    if len(headers.raw) > MAX_HEADERS or _size(headers.raw) > MAX_HEADER_BYTES:
        return HeadersTooLarge(hint=f"at most {MAX_HEADERS} headers, {MAX_HEADER_BYTES} bytes")
    asked = [inner_path(scope), *(part for pair in QueryParams(scope["query_string"]).multi_items()
                              for part in pair)]  # fmt: skip
    if any(CONTROL.search(text) for text in asked):
        message, hint = "The address holds a control character.", "remove it: it may be written %00"
        return InputError(message, code="bad_character", hint=hint)
    return None


def _size(headers: Sequence[tuple[bytes, bytes]]) -> int:
    return sum(len(name) + len(value) for name, value in headers)


def _bad_body(scope: Scope, headers: Headers, limit: int) -> InputError | None:
    if headers.get("content-encoding", "identity").lower() != "identity":
        message = "Compressed bodies are not taken."
        return Unsupported(message, code="unsupported_encoding", hint="send it as it is")
    length = headers.get("content-length", "0")
    if length.isdigit() and int(length) > limit:
        return BodyTooLarge(hint=f"at most {limit} bytes")
    wanted = _media(inner_path(scope))
    media = headers.get("content-type", "").partition(";")[0].strip().lower()
    if _has_body(headers) and scope["method"] != "GET" and media != wanted:
        return Unsupported(f"This address takes {wanted}.", field="Content-Type")
    return None


def _media(path: str) -> str:
    if path == UPLOADS:
        return "multipart/form-data"
    return "application/x-www-form-urlencoded" if path in FORMS else "application/json"


def _has_body(headers: Headers) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
