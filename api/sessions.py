"""A browser's login: a sealed cookie that stands for an API key, for a while, below one path.

The cookie holds a session's number, its end and the key's hash, signed; it opens nothing but what
``Login`` lets it open, and only as long as the key itself is good. No row is written for it: each
API that knows the secret can read it, and a logout is known to the process that was told of it.
"""

import base64
import binascii
import hashlib
import hmac
import secrets
import struct
import threading
import time

from starlette.requests import cookie_parser
from starlette.responses import Response
from starlette.types import Scope

COOKIE = "tuneyard_session"
FORM_COOKIE = "tuneyard_form"
PATH = "/flower"
FORM_S = 3600

BODY = struct.Struct(">16sQ32s")
"""Number of the session, its end in Unix seconds, the SHA-256 of the API key."""

SEAL_BYTES = 32
MAX_CHARACTERS = 200


class Sessions:
    """The logins of browsers."""

    def __init__(self, secret: str | None, *, lasting_s: float) -> None:
        made_of = secret.encode() if secret else secrets.token_bytes(32)
        self._key = hashlib.sha256(b"tuneyard session\0" + made_of).digest()
        self._lasting_s = lasting_s
        self._lock = threading.Lock()
        self._ended: dict[bytes, int] = {}

    def begin(self, scope: Scope, response: Response, key_hash: bytes) -> None:
        """Give the browser a session of this key."""
        body = BODY.pack(secrets.token_bytes(16), int(time.time() + self._lasting_s), key_hash)
        text = base64.urlsafe_b64encode(body + self._seal(body)).decode().rstrip("=")
        _set(scope, response, COOKIE, text, lasting_s=int(self._lasting_s))

    def key_hash(self, scope: Scope) -> bytes | None:
        """The hash of the key that a request's session stands for; None without a good one."""
        found = self._read(scope)
        return found[1] if found else None

    def end(self, scope: Scope, response: Response) -> None:
        """Log out: the browser forgets the cookie, and a copy of it opens nothing here any more."""
        if found := self._read(scope):
            number, _, ends = found
            with self._lock:
                self._ended = {n: e for n, e in self._ended.items() if e > time.time()}
                self._ended[number] = ends
        _set(scope, response, COOKIE, "", lasting_s=0)

    def _read(self, scope: Scope) -> tuple[bytes, bytes, int] | None:
        text = cookies(scope).get(COOKIE, "")
        if not text or len(text) > MAX_CHARACTERS:
            return None
        try:
            raw = base64.b64decode(text + "==", altchars=b"-_", validate=True)
            body, seal = raw[:-SEAL_BYTES], raw[-SEAL_BYTES:]
            number, ends, key_hash = BODY.unpack(body)
        except (binascii.Error, struct.error, ValueError):
            return None
        if not hmac.compare_digest(seal, self._seal(body)):
            return None
        if ends <= time.time() or number in self._ended:
            return None
        return number, key_hash, ends

    def _seal(self, body: bytes) -> bytes:
        return hmac.digest(self._key, body, "sha256")


def give_form_token(scope: Scope, response: Response, token: str) -> None:
    """Remember a form's token in the browser; only that form's page knows it too."""
    _set(scope, response, FORM_COOKIE, token, lasting_s=FORM_S)


def is_own_form(scope: Scope, token: str) -> bool:
    """Whether a form comes from a page of ours in this browser, and from no other site."""
    site = [value for name, value in scope["headers"] if name == b"sec-fetch-site"]
    if site and site != [b"same-origin"]:
        return False
    known = cookies(scope).get(FORM_COOKIE, "")
    return bool(known) and hmac.compare_digest(known.encode(), token.encode())


def cookies(scope: Scope) -> dict[str, str]:
    """The cookies of a request."""
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        if name == b"cookie":
            found |= cookie_parser(value.decode("latin-1"))
    return found


def _set(scope: Scope, response: Response, name: str, value: str, *, lasting_s: int) -> None:
    response.set_cookie(
        name,
        value,
        max_age=lasting_s,
        path=scope["root_path"] + PATH,
        secure=scope["scheme"] == "https",
        httponly=True,
        samesite="strict",
    )
