"""Who asks, and how many may ask at once: keys, roles, the database's share of threads."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated
from urllib.parse import quote
from uuid import UUID

from anyio import to_thread
from fastapi import Depends, Request
from sqlalchemy import Connection
from starlette.datastructures import Headers
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tuneyard.api import sessions
from tuneyard.api.prefix import inner_path
from tuneyard.api.problems import answer
from tuneyard.checks.models import model_facts
from tuneyard.models.engine import Database, Patience
from tuneyard.models.keys import Caller, hash_key, key_holder
from tuneyard.specs.errors import (
    Forbidden,
    InputError,
    NotFound,
    TuneyardError,
    Unauthenticated,
    Unavailable,
)
from tuneyard.specs.ids import parse_id
from tuneyard.specs.settings import Settings
from tuneyard.store.folder import FolderDamaged
from tuneyard.store.remote import Shelf, open_store

KEY_KNOWN_S = 5.0
KEYS_KNOWN = 1000
MAX_KEY_CHARACTERS = 200
WAIT_FOR_TURN_S = 2.0
PATIENCE = Patience(connect_s=2, ping_s=1.0, answer_s=4.0)
"""Whoever asks is answered within about 5 s: by 503 where PostgreSQL says nothing."""
STORE_ANSWERS_WITHIN_S = 8.0

PAGES = sessions.PATH
"""Below here a browser's session counts as its key, and nowhere else."""

OPEN_PATHS = frozenset(
    {"/healthz", "/readyz", "/docs", "/openapi.json", f"{PAGES}/login", f"{PAGES}/logout"}
)
"""Exactly these are answered without a key."""

LOOKING = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing: all that a viewer's key may use."""


class Yard:
    """What all routes share: settings, database, store, and what is known for a while."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        url = settings.database_url.get_secret_value()
        # Streams and the checker use the pool's overflow: requests have their turns to themselves.
        self.db = Database(url, "ty-api", pool_size=settings.api_threads, patience=PATIENCE)
        self.store = open_store(settings, answer_within_s=STORE_ANSWERS_WITHIN_S)
        secret = settings.session_secret
        self.sessions = sessions.Sessions(
            secret.get_secret_value() if secret else None, lasting_s=settings.session_s
        )
        self._turns = threading.BoundedSemaphore(settings.api_threads)
        self._callers: dict[bytes, tuple[float, Caller]] = {}
        self._facts: dict[UUID, dict[str, object]] = {}

    @contextmanager
    def begin(self, team: UUID | None) -> Iterator[Connection]:
        """A transaction that sees one team's rows. Raises: Unavailable db_busy."""
        with self._turn(), self.db.begin(team=team) as tx:
            yield tx

    @contextmanager
    def snapshot(self, team: UUID) -> Iterator[Connection]:
        """One moment of a team's rows, to read several of them. Raises: Unavailable db_busy."""
        with self._turn(), self.db.snapshot(team=team) as tx:
            yield tx

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._turns.acquire(timeout=WAIT_FOR_TURN_S):
            raise Unavailable("Too many requests at once; ask again.", code="db_busy")
        try:
            yield
        finally:
            self._turns.release()

    def known_caller(self, key_hash: bytes) -> Caller | None:
        """Whose key this is, if that was asked a moment ago."""
        known = self._callers.get(key_hash)
        if known is None or time.monotonic() - known[0] > KEY_KNOWN_S:
            return None
        return known[1]

    def caller(self, key_hash: bytes) -> Caller:
        """Whose key this is. Raises: Unauthenticated."""
        with self.begin(None) as tx:
            caller = key_holder(tx, key_hash)
        if caller is None:
            raise Unauthenticated("This API key is not known.")
        if len(self._callers) >= KEYS_KNOWN:
            self._callers.clear()
        self._callers[key_hash] = (time.monotonic(), caller)
        return caller

    def facts(self, model: Mapping[str, str]) -> dict[str, object] | None:
        """What a model's headers say; None where its folder is gone or odd.

        model: as ``jobs.inputs`` holds it, a base model or an artifact of a team.
        Raises: StoreUnreachable.
        """
        ((kind, text),) = model.items()
        model_id = UUID(text)
        if model_id not in self._facts:
            shelf: Shelf = "models" if kind == "base_model" else "artifacts"
            try:
                with self.store.look_into(shelf, model_id) as folder:
                    self._facts[model_id] = model_facts(folder)
            except (OSError, InputError, FolderDamaged):
                return None
        return self._facts[model_id]


class Login:
    """ASGI middleware: whatever is asked for, first who asks. Unknown paths too need a key."""

    def __init__(self, app: ASGIApp, *, yard: Yard) -> None:
        self._app, self._yard = app, yard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on with ``scope["caller"]``, or answer 401 or 403."""
        if scope["type"] == "http" and inner_path(scope) not in OPEN_PATHS:
            try:
                scope["caller"] = await self._caller(scope)
            except Unauthenticated as error:
                response = _to_login(scope) if _shows_pages(scope) else answer(error)
                await response(scope, receive, send)
                return
            except TuneyardError as error:
                await answer(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _caller(self, scope: Scope) -> Caller:
        key_hash = self._key_hash(scope)
        caller = self._yard.known_caller(key_hash)
        if caller is None:
            caller = await to_thread.run_sync(self._yard.caller, key_hash)
        if scope["method"] not in LOOKING and not caller.may_write:
            raise Forbidden("A viewer's key may only look.")
        if _is_page(scope):
            refuse_one_team(caller)
        return caller

    def _key_hash(self, scope: Scope) -> bytes:
        """The hash of a Bearer key, or on our pages of the session's. Raises: Unauthenticated."""
        by_session = _is_page(scope) and "authorization" not in Headers(scope=scope)
        of_session = self._yard.sessions.key_hash(scope) if by_session else None
        return of_session or hash_key(_bearer(scope))


def admin_of(yard: Yard, key_hash: bytes) -> Caller:
    """Whose key this is, who may see our pages. Raises: Unauthenticated, Forbidden."""
    caller = yard.caller(key_hash)
    refuse_one_team(caller)
    return caller


def refuse_one_team(caller: Caller) -> None:
    """Raises: Forbidden to whom may see the work of one team alone."""
    if not caller.sees_all_teams:
        hint = "ask with the key of an administrator"
        raise Forbidden("These pages show the work of all teams.", hint=hint)


def is_key(text: str) -> bool:
    """Whether it may be a key at all."""
    return 0 < len(text) <= MAX_KEY_CHARACTERS


def _bearer(scope: Scope) -> str:
    """The key in the header, the only place where one is taken. Raises: Unauthenticated."""
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    scheme, _, key = (given[0] if given else b"").decode("latin-1").partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not is_key(key):
        raise Unauthenticated(hint="send the header `Authorization: Bearer YOUR_KEY`")
    return key


def _is_page(scope: Scope) -> bool:
    path = inner_path(scope)
    return path == PAGES or path.startswith(f"{PAGES}/")


def _shows_pages(scope: Scope) -> bool:
    """Whether it is a browser that asks for a page to show, and no program."""
    headers = Headers(scope=scope)
    asks = scope["method"] == "GET" and "text/html" in headers.get("accept", "")
    return _is_page(scope) and asks and "authorization" not in headers


def _to_login(scope: Scope) -> RedirectResponse:
    wanted = inner_path(scope)
    if scope["query_string"]:
        wanted += "?" + scope["query_string"].decode("latin-1")
    where = f"{PAGES}/login?next={quote(wanted, safe='/')}"
    return RedirectResponse(where, 303, {"Cache-Control": "no-store"})


def yard_of(request: Request) -> Yard:
    """The application's shared things."""
    yard: Yard = request.app.state.yard
    return yard


def caller_of(request: Request) -> Caller:
    """Whom ``Login`` let in."""
    caller: Caller = request.scope["caller"]
    return caller


TheCaller = Annotated[Caller, Depends(caller_of)]
TheYard = Annotated[Yard, Depends(yard_of)]


def path_id(kind: str, text: str) -> UUID:
    """An id in a path: one of a wrong form is not there, like any other that is not."""
    try:
        return parse_id(kind, text)
    except InputError:
        raise NotFound(f"There is no such {kind} here.", field=kind) from None
