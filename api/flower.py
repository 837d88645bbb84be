"""/flower: Celery's dashboard, read-only, behind the login; Flower itself listens for us alone.

Whatever is asked here, Flower is asked for one path below its own address, by GET, with no header
of the client but a few harmless ones; of its answer, too, only named headers come back.
"""

import re
from base64 import b64encode
from collections.abc import AsyncIterator, Mapping
from hashlib import sha256
from urllib.parse import parse_qsl, quote, unquote_to_bytes, urlencode, urlsplit

import httpx
from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response, StreamingResponse

from tuneyard.api.limits import BodyTooLarge
from tuneyard.api.prefix import inner_raw_path
from tuneyard.api.sessions import PATH
from tuneyard.specs.errors import InputError, NotFound, TuneyardError, Unavailable

router = APIRouter(prefix=PATH, include_in_schema=False)

TIMEOUT = httpx.Timeout(15.0, connect=2.0)
AT_ONCE = 20
MAX_PAGE_BYTES = 8 * 1024**2
MAX_ANSWER_BYTES = 64 * 1024**2
MAX_TABLE_BYTES = 16 * 1024
MAX_TABLE_FIELDS = 500

ASKED_WITH = ("accept", "accept-language", "if-none-match", "if-modified-since")
ANSWERED_WITH = ("content-type", "cache-control", "etag", "last-modified", "expires")
PASSED_ON = (304, *range(400, 500))
SAFE_IN_SEGMENTS = "@:~!$&'()*+,;="

INLINE = b"\nvar autorefresh = 1;\n"
"""The one script that stands in a page of Flower's itself, the page of workers."""

POLICY = (
    "default-src 'self';"
    f" script-src 'self' 'sha256-{b64encode(sha256(INLINE).digest()).decode()}';"
    " style-src 'self' 'unsafe-inline'; img-src 'self' data:; object-src 'none';"
    " frame-ancestors 'none'; form-action 'self'; base-uri 'none'"
)
"""What tasks are called is written by users: no other script of a page's own text ever runs."""

GUARDS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
SIDE_BAR = b'<ul class="app-nav app-nav-secondary navbar-nav ms-lg-auto">'
LOGOUT = b'\n<li class="nav-item"><a class="nav-link" href="%s/logout">Log out</a></li>'


class FlowerFailed(TuneyardError):
    """Flower answered something that cannot be shown."""

    code = "flower_failed"
    http_status = 502


class Flower:
    """The one address that is asked for pages."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._origin = f"{parts.scheme}://{parts.netloc}" if url else ""
        self.path = parts.path
        # No httpx client: it would keep Flower's cookies, and send one user's with another's.
        self._http = httpx.AsyncHTTPTransport(
            limits=httpx.Limits(max_connections=AT_ONCE, keepalive_expiry=5.0),
            trust_env=False,
            verify=False,  # settings allow http:// alone, and loading authorities takes its time
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def ask(self, path: str, query: str, headers: Mapping[str, str]) -> httpx.Response:
        """The beginning of an answer, to be closed. Raises: NotFound, Unavailable, FlowerFailed."""
        if not self._origin:
            hint = "set TUNEYARD_FLOWER_URL for the API"
            raise NotFound("There is no Flower here.", hint=hint)
        target = self.path + path + (f"?{query}" if query else "")
        url = httpx.URL(self._origin).copy_with(raw_path=target.encode("ascii"))
        timeouts = {"timeout": TIMEOUT.as_dict()}
        request = httpx.Request("GET", url, headers=headers, extensions=timeouts)
        try:
            answer = await self._http.handle_async_request(request)
        except httpx.TransportError:
            hint = "jobs run without it; `tuneyard status` tells whether it does"
            raise Unavailable("Flower does not answer.", code="flower_away", hint=hint) from None
        if not (answer.status_code < 300 or answer.status_code in PASSED_ON):
            await answer.aclose()
            raise FlowerFailed(hint=f"it answered {answer.status_code}")
        return answer


@router.get("")
async def front() -> Response:
    """The front page stands at the address with a slash: its links begin there."""
    return RedirectResponse(f"{PATH}/", 308)


@router.post("/tasks/datatable")
async def table(request: Request) -> Response:
    """The rows of the page of tasks: it asks for them by a form, and nothing is changed by it."""
    body = await request.body()
    if len(body) > MAX_TABLE_BYTES:
        raise BodyTooLarge(hint=f"at most {MAX_TABLE_BYTES} bytes")
    return await _show(request, "/tasks/datatable", body.decode("latin-1"))


@router.api_route("/{path:path}", methods=["GET", "HEAD"])
async def show(request: Request) -> Response:
    """A page of Flower, a file of its pages, or an answer of the reading part of its API."""
    path = _path_below(inner_raw_path(request.scope).removeprefix(PATH.encode()))
    return await _show(request, path, request.scope["query_string"].decode("latin-1"))


def _path_below(raw: bytes) -> str:
    """A path as Flower is asked for it, escaped anew. Raises: NotFound for any that is odd.

    Odd are empty segments, `.` and `..`, and whatever holds an escaped slash, backslash, percent
    sign or control character: two programs might read it in two ways.
    """
    first, *segments = raw.split(b"/")
    decoded = [unquote_to_bytes(segment) for segment in segments]
    if first or not decoded or b"" in decoded[:-1] or any(map(_is_odd, decoded)):
        raise NotFound("There is nothing at this address.")
    return "".join("/" + quote(segment, safe=SAFE_IN_SEGMENTS) for segment in decoded)


def _is_odd(segment: bytes) -> bool:
    return segment in (b".", b"..") or re.search(rb"[\x00-\x1f\x7f/\\%]", segment) is not None


async def _show(request: Request, path: str, query: str) -> Response:
    flower: Flower = request.app.state.flower
    asked_with = {name: request.headers[name] for name in ASKED_WITH if name in request.headers}
    asked_with["accept-encoding"] = "identity"
    answer = await flower.ask(path, _query(query), asked_with)
    headers = {name: answer.headers[name] for name in ANSWERED_WITH if name in answer.headers}
    headers |= GUARDS
    if request.method == "HEAD":
        await answer.aclose()
        return StreamingResponse(iter(()), answer.status_code, headers)
    if answer.headers.get("content-type", "").startswith("text/html"):
        page = relink(await _whole(answer), flower.path, request.scope["root_path"] + PATH)
        headers = {**headers, "cache-control": "no-store"}
        headers.pop("etag", None)
        return Response(page, answer.status_code, headers)
    return StreamingResponse(_pieces(answer), answer.status_code, headers)


def _query(text: str) -> str:
    try:
        pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=MAX_TABLE_FIELDS)
    except ValueError:
        raise InputError("There are too many parameters.") from None
    return urlencode(pairs)


async def _whole(answer: httpx.Response) -> bytes:
    page = bytearray()
    async for piece in _pieces(answer):
        page += piece
        if len(page) > MAX_PAGE_BYTES:
            await answer.aclose()
            raise FlowerFailed("This page of Flower is too large to be shown.")
    return bytes(page)


async def _pieces(answer: httpx.Response) -> AsyncIterator[bytes]:
    """An answer as it comes; what grows too large, or breaks, is cut off for the client as well."""
    size = 0
    try:
        async for piece in answer.aiter_raw():
            size += len(piece)
            if size > MAX_ANSWER_BYTES:
                raise FlowerFailed("This answer of Flower is too large to be passed on.")
            yield piece
    except httpx.TransportError:
        raise FlowerFailed("Flower's answer broke off.") from None
    finally:
        await answer.aclose()


def relink(page: bytes, path: str, seen_at: str) -> bytes:
    """A page of a Flower below ``path``, with its links as they are where it is seen.

    Flower escapes each quote in what it shows: such an attribute is one that its template wrote.
    """
    public = seen_at.encode()
    own = re.compile(rb'(\b(?:href|src)=")' + re.escape(path.encode()) + rb"/(?!/)")
    page = own.sub(lambda found: found[1] + public + b"/", page)
    told = re.compile(rb'(<input type="hidden" value=")[^"]*(" id="url_prefix">)')
    page = told.sub(lambda found: found[1] + public + found[2], page)
    return page.replace(SIDE_BAR, SIDE_BAR + LOGOUT % public, 1)
