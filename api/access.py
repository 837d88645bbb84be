"""Who asks, and how many may ask at once: keys, roles, the database's share of threads."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated
from uuid import UUID

from fastapi import Depends, Request
from sqlalchemy import Connection

from tuneyard.checks.models import model_facts
from tuneyard.models.engine import Database
from tuneyard.models.keys import Caller, hash_key, key_holder
from tuneyard.specs.errors import Forbidden, InputError, NotFound, Unauthenticated, Unavailable
from tuneyard.specs.ids import parse_id
from tuneyard.specs.settings import Settings
from tuneyard.store.remote import Store

KEY_KNOWN_S = 5.0
KEYS_KNOWN = 1000
WAIT_FOR_TURN_S = 2.0


class Yard:
    """What all routes share: settings, database, store, and what is known for a while."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.db = Database(settings.database_url.get_secret_value(), "ty-api", pool_size=5)
        self.store = Store(settings.store_root)
        self._turns = threading.BoundedSemaphore(settings.api_threads)
        self._callers: dict[bytes, tuple[float, Caller]] = {}
        self._facts: dict[UUID, dict[str, object]] = {}

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A share of the database's connections. Raises: Unavailable db_busy."""
        if not self._turns.acquire(timeout=WAIT_FOR_TURN_S):
            raise Unavailable("Too many requests at once; ask again.", code="db_busy")
        try:
            yield
        finally:
            self._turns.release()

    @contextmanager
    def begin(self, team: UUID | None) -> Iterator[Connection]:
        """A transaction that sees one team's rows."""
        with self.turn(), self.db.begin(team=team) as tx:
            yield tx

    def caller(self, key: str) -> Caller:
        """Whose key this is. Raises: Unauthenticated."""
        digest = hash_key(key)
        known = self._callers.get(digest)
        if known is not None and time.monotonic() - known[0] < KEY_KNOWN_S:
            return known[1]
        with self.begin(None) as tx:
            caller = key_holder(tx, key)
        if caller is None:
            raise Unauthenticated("This API key is not known.")
        if len(self._callers) >= KEYS_KNOWN:
            self._callers.clear()
        self._callers[digest] = (time.monotonic(), caller)
        return caller

    def facts(self, base_model: UUID) -> dict[str, object] | None:
        """What a base model's headers say; None where its folder is not to be had."""
        if base_model not in self._facts:
            try:
                self._facts[base_model] = model_facts(self.store.folder("models", base_model))
            except (OSError, InputError):
                return None
        return self._facts[base_model]


def yard_of(request: Request) -> Yard:
    """The application's shared things."""
    yard: Yard = request.app.state.yard
    return yard


def reader(request: Request) -> Caller:
    """Whoever holds a key. Raises: Unauthenticated."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip() or len(key) > 200:
        raise Unauthenticated(hint="send the header `Authorization: Bearer YOUR_KEY`")
    return yard_of(request).caller(key.strip())


def writer(caller: Annotated[Caller, Depends(reader)]) -> Caller:
    """Whoever may change things. Raises: Unauthenticated, Forbidden."""
    if not caller.may_write:
        raise Forbidden("A viewer's key may only look.")
    return caller


Reader = Annotated[Caller, Depends(reader)]
Writer = Annotated[Caller, Depends(writer)]
TheYard = Annotated[Yard, Depends(yard_of)]


def path_id(kind: str, text: str) -> UUID:
    """An id in a path: one of a wrong form is not there, like any other that is not."""
    try:
        return parse_id(kind, text)
    except InputError:
        raise NotFound(f"There is no such {kind} here.", field=kind) from None
