"""What is cut off before a route sees it: bodies, encodings, types and addresses of odd size."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from uuid import uuid4

from tuneyard.api.problems import answer
from tuneyard.specs.errors import InputError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

MAX_TARGET_BYTES = 8 * 1024
UPLOADS = "/api/v1/files"


class BodyTooLarge(InputError):
    """The body is larger than this route takes."""

    code = "body_too_large"
    http_status = 413


class _TargetTooLong(InputError):
    """The address is too long."""

    code = "uri_too_long"
    http_status = 414


class _Unsupported(InputError):
    """The body is of a kind that is not taken."""

    code = "unsupported_media_type"
    http_status = 415


class Limits:
    """ASGI middleware around the whole application; gives each answer its x-request-id."""

    def __init__(self, app: App, *, max_body_bytes: int, max_file_bytes: int) -> None:
        self._app = app
        self._max_body_bytes, self._max_file_bytes = max_body_bytes, max_file_bytes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Refuse, or pass on with a body that is counted as it comes."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message.setdefault("headers", [])
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id.encode()),
                ]
            await send(message)

        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        problem = self._problem(scope, headers)
        if problem is not None:
            await answer(problem)(scope, receive, send_with_id)
            return
        limited = self._counted(receive, self._limit(scope))
        try:
            await self._app(scope, limited, send_with_id)
        except BodyTooLarge as error:
            await answer(error)(scope, receive, send_with_id)

    def _limit(self, scope: Message) -> int:
        return self._max_file_bytes if scope["path"] == UPLOADS else self._max_body_bytes

    def _problem(self, scope: Message, headers: dict[str, bytes]) -> InputError | None:
        target = len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
        if target > MAX_TARGET_BYTES:
            return _TargetTooLong()
        if headers.get("content-encoding", b"identity") != b"identity":
            message = "Compressed bodies are not taken."
            return _Unsupported(message, code="unsupported_encoding", hint="send it as it is")
        length = headers.get("content-length", b"0")
        if length.isdigit() and int(length) > self._limit(scope):
            return BodyTooLarge(hint=f"at most {self._limit(scope)} bytes")
        has_body = length != b"0" or "transfer-encoding" in headers
        if scope["method"] in ("POST", "PUT", "PATCH") and has_body:
            wanted = b"multipart/form-data" if scope["path"] == UPLOADS else b"application/json"
            if not headers.get("content-type", b"").lower().startswith(wanted):
                return _Unsupported(f"This route takes {wanted.decode()}.")
        return None

    def _counted(self, receive: Receive, limit: int) -> Receive:
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise BodyTooLarge(hint=f"at most {limit} bytes")
            return message

        return counted
