"""Who asks, and how many may ask at once: keys, roles, the database's share of threads."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated
from uuid import UUID

from anyio import to_thread
from fastapi import Depends, Request
from sqlalchemy import Connection
from starlette.types import ASGIApp, Receive, Scope, Send

from tuneyard.api.problems import answer
from tuneyard.checks.models import model_facts
from tuneyard.models.engine import Database
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
from tuneyard.store.remote import open_store

KEY_KNOWN_S = 5.0
KEYS_KNOWN = 1000
MAX_KEY_CHARACTERS = 200
WAIT_FOR_TURN_S = 2.0
STORE_ANSWERS_WITHIN_S = 8.0

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/docs", "/openapi.json"})
"""Exactly these are answered without a key."""

LOOKING = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing: all that a viewer's key may use."""


class Yard:
    """What all routes share: settings, database, store, and what is known for a while."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        url = settings.database_url.get_secret_value()
        # Streams and the checker use the pool's overflow: requests have their turns to themselves.
        self.db = Database(url, "ty-api", pool_size=settings.api_threads)
        self.store = open_store(settings, answer_within_s=STORE_ANSWERS_WITHIN_S)
        self._turns = threading.BoundedSemaphore(settings.api_threads)
        self._callers: dict[bytes, tuple[float, Caller]] = {}
        self._facts: dict[UUID, dict[str, object]] = {}

    @contextmanager
    def begin(self, team: UUID | None) -> Iterator[Connection]:
        """A transaction that sees one team's rows. Raises: Unavailable db_busy."""
        if not self._turns.acquire(timeout=WAIT_FOR_TURN_S):
            raise Unavailable("Too many requests at once; ask again.", code="db_busy")
        try:
            with self.db.begin(team=team) as tx:
                yield tx
        finally:
            self._turns.release()

    def known_caller(self, key: str) -> Caller | None:
        """Whose key this is, if that was asked a moment ago."""
        known = self._callers.get(hash_key(key))
        if known is None or time.monotonic() - known[0] > KEY_KNOWN_S:
            return None
        return known[1]

    def caller(self, key: str) -> Caller:
        """Whose key this is. Raises: Unauthenticated."""
        with self.begin(None) as tx:
            caller = key_holder(tx, key)
        if caller is None:
            raise Unauthenticated("This API key is not known.")
        if len(self._callers) >= KEYS_KNOWN:
            self._callers.clear()
        self._callers[hash_key(key)] = (time.monotonic(), caller)
        return caller

    def facts(self, base_model: UUID) -> dict[str, object] | None:
        """What a base model's headers say; None where its folder is gone or odd.

        Raises: StoreUnreachable.
        """
        if base_model not in self._facts:
            try:
                with self.store.look_into("models", base_model) as folder:
                    self._facts[base_model] = model_facts(folder)
            except (OSError, InputError, FolderDamaged):
                return None
        return self._facts[base_model]


class Login:
    """ASGI middleware: whatever is asked for, first who asks. Unknown paths too need a key."""

    def __init__(self, app: ASGIApp, *, yard: Yard) -> None:
        self._app, self._yard = app, yard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on with ``scope["caller"]``, or answer 401 or 403."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            try:
                scope["caller"] = await self._caller(scope)
            except TuneyardError as error:
                await answer(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _caller(self, scope: Scope) -> Caller:
        key = _bearer(scope)
        caller = self._yard.known_caller(key)
        if caller is None:
            caller = await to_thread.run_sync(self._yard.caller, key)
        if scope["method"] not in LOOKING and not caller.may_write:
            raise Forbidden("A viewer's key may only look.")
        return caller


def _bearer(scope: Scope) -> str:
    """The key in the header, the only place where one is taken. Raises: Unauthenticated."""
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    scheme, _, key = (given[0] if given else b"").decode("latin-1").partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key or len(key) > MAX_KEY_CHARACTERS:
        raise Unauthenticated(hint="send the header `Authorization: Bearer YOUR_KEY`")
    return key


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
