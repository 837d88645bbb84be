"""Behind a path prefix: what a proxy put before our paths is set aside before all else.

Some proxies strip their prefix and pass the rest on, others pass on all of it; a path that begins
with the prefix is taken to be of the second kind. Whoever asks without any prefix is served too.
"""

import logging
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tuneyard.specs.prefix import clean_prefix

log = logging.getLogger(__name__)

SCHEMES = ("http", "https")
SHOWN_CHARACTERS = 100

Networks = Sequence[IPv4Network | IPv6Network]


class Prefix:
    """ASGI middleware, the outermost: sets ``root_path``, and puts it before each Location.

    What trusted proxies say (X-Forwarded-Prefix, X-Forwarded-Proto) is heeded; what anybody else
    says is not, nor what is not clean. Inside, ``path`` always begins with ``root_path``.
    """

    def __init__(self, app: ASGIApp, *, root_path: str, trusted: Networks) -> None:
        self._app, self._root_path, self._trusted = app, root_path, trusted
        self._warned = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on with the prefix in its place."""
        if scope["type"] != "http" or not scope["path"].startswith("/"):
            await self._app(scope, receive, send)
            return
        scope = dict(scope)
        prefix = self._root_path
        if _is_from(scope, self._trusted):
            prefix = self._forwarded(scope, prefix)
            if (scheme := _said(scope, b"x-forwarded-proto")) in SCHEMES:
                scope["scheme"] = scheme
        _set_aside(scope, prefix)

        async def send_located(message: Message) -> None:
            if prefix and message["type"] == "http.response.start":
                _locate(message, prefix)
            await send(message)

        await self._app(scope, receive, send_located)

    def _forwarded(self, scope: Scope, otherwise: str) -> str:
        said = _said(scope, b"x-forwarded-prefix")
        if said is None:
            return otherwise
        prefix = clean_prefix(said)
        if prefix is None:
            if not self._warned:
                self._warned = True
                extra = {"event": "prefix_ignored", "said": said[:SHOWN_CHARACTERS]}
                log.warning("a proxy sends a prefix that is not clean", extra=extra)
            return otherwise
        return prefix


def inner_path(scope: Scope) -> str:
    """The path within the application, decoded."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def inner_raw_path(scope: Scope) -> bytes:
    """The path within the application, as it was sent."""
    path: bytes = scope["raw_path"]
    return path.removeprefix(scope.get("root_path", "").encode())


def _is_from(scope: Scope, trusted: Networks) -> bool:
    try:
        peer = ip_address((scope.get("client") or ("",))[0])
    except ValueError:
        return False
    if isinstance(peer, IPv6Address) and peer.ipv4_mapped:
        peer = peer.ipv4_mapped
    return any(peer in network for network in trusted)


def _said(scope: Scope, header: bytes) -> str | None:
    """A header's only value; two of them are one that is not clean."""
    values = [value for name, value in scope["headers"] if name == header]
    return b", ".join(values).decode("latin-1").strip() if values else None


def _set_aside(scope: Scope, prefix: str) -> None:
    """path = root_path + the path within, whichever kind of proxy it came through."""
    raw = prefix.encode()
    inner, raw_inner = scope["path"], scope["raw_path"]
    # Compared as it was sent: an escaped prefix is none.
    if raw_inner == raw or raw_inner.startswith(raw + b"/"):
        inner, raw_inner = inner.removeprefix(prefix), raw_inner.removeprefix(raw)
    scope["root_path"] = prefix
    scope["path"], scope["raw_path"] = prefix + (inner or "/"), raw + (raw_inner or b"/")


def _locate(message: Message, prefix: str) -> None:
    headers = MutableHeaders(scope=message)
    location = headers.get("location", "")
    if location.startswith("/"):
        headers["location"] = prefix + location
