"""Connections to PostgreSQL: two bounded pools a process, transactions, and what may be retried."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import psycopg
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import Connection, Engine, NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError, TimeoutError
from sqlalchemy.pool import QueuePool

from tuneyard.specs.errors import Forbidden, Unavailable

RETRYABLE = ("08", "25P", "40001", "40P01", "53", "55P03", "57014", "57P0")
"""SQLSTATEs (or their class) after which the whole unit may be run again."""

CONNECT_ARGS: dict[str, Any] = {
    "connect_timeout": 3,
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 8000,
}


class Database:
    """A process's way to PostgreSQL.

    ``begin`` opens a transaction from the ordinary pool; ``begin_reserved`` from one connection
    kept apart, so that renewals get through when the pool is full.
    """

    def __init__(self, url: str, name: str, *, pool_size: int = 5) -> None:
        self.url = url
        self.name = name
        self._engine = _engine(url, name, size=pool_size, overflow=5)
        self._reserved = _engine(url, name + "-reserved", size=1, overflow=0)

    @contextmanager
    def begin(self, *, team: UUID | None = None) -> Iterator[Connection]:
        """A transaction; with ``team`` row level security shows that team's rows alone.

        Raises: Unavailable when PostgreSQL cannot be reached, is busy or went away: nothing was
        kept, or (at the commit) whether it was is unknown and must be asked by key or token.
        """
        with _translated(), self._engine.begin() as tx:
            _see_as(tx, team)
            yield tx

    @contextmanager
    def snapshot(self, *, team: UUID | None = None) -> Iterator[Connection]:
        """A transaction that only reads, all its statements at one moment. Raises: Unavailable."""
        with _translated(), self._engine.connect() as tx:
            tx.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            with tx.begin():
                _see_as(tx, team)
                yield tx

    @contextmanager
    def begin_reserved(self) -> Iterator[Connection]:
        """A transaction on the reserved connection. Raises: Unavailable."""
        with _translated(), self._reserved.begin() as tx:
            yield tx

    def listener(self) -> psycopg.Connection[Any]:
        """A connection of its own, in autocommit, for LISTEN."""
        url = libpq_url(self.url)
        try:
            return psycopg.connect(
                url, autocommit=True, application_name=self.name + "-listen", **CONNECT_ARGS
            )
        except psycopg.OperationalError as error:
            raise _unavailable(error) from error

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()
        self._reserved.dispose()


@contextmanager
def administer(url: str, name: str) -> Iterator[Connection]:
    """A transaction on a connection of its own, for what a person runs as the tables' owner.

    It waits two seconds for what others hold. Raises: Unavailable with the reason, Forbidden when
    the URL's role may not do that.
    """
    engine = create_engine(
        _sqlalchemy_url(url),
        poolclass=NullPool,
        hide_parameters=True,
        connect_args=CONNECT_ARGS | {"application_name": name},
    )
    try:
        with engine.begin() as tx:
            tx.execute(text("SET LOCAL lock_timeout = '2s'"))
            yield tx
    except DBAPIError as error:
        reason = str(error.orig).strip().split("\n")[0]
        if isinstance(error.orig, psycopg.errors.InsufficientPrivilege):
            hint = "TUNEYARD_DATABASE_URL must name the role that owns the tables"
            raise Forbidden(f"PostgreSQL refuses: {reason}.", hint=hint) from None
        if not is_retryable(error):
            raise
        if getattr(error.orig, "sqlstate", None) is None:
            hint = "is it running, and is TUNEYARD_DATABASE_URL right?"
            raise Unavailable(f"PostgreSQL cannot be reached: {reason}.", hint=hint) from None
        hint = "nothing was changed: run it again"
        raise Unavailable(f"PostgreSQL is busy: {reason}.", hint=hint) from None


def _see_as(tx: Connection, team: UUID | None) -> None:
    """Let row level security show one team's rows; SET LOCAL takes no parameter."""
    if team is not None:
        tx.execute(text("SELECT set_config('tuneyard.team', :team, true)"), {"team": str(team)})


def libpq_url(url: str) -> str:
    """The URL without SQLAlchemy's driver name."""
    return url.replace("postgresql+psycopg://", "postgresql://", 1)


def where(url: str) -> str:
    """Host, port and name of a database, without its secrets, for messages."""
    parts = conninfo_to_dict(libpq_url(url))
    return f"{parts.get('host', 'localhost')}:{parts.get('port', 5432)}/{parts.get('dbname', '')}"


def _sqlalchemy_url(url: str) -> str:
    return libpq_url(url).replace("postgresql://", "postgresql+psycopg://", 1)


def _engine(url: str, name: str, *, size: int, overflow: int) -> Engine:
    return create_engine(
        _sqlalchemy_url(url),
        poolclass=QueuePool,
        pool_pre_ping=True,
        pool_size=size,
        max_overflow=overflow,
        pool_timeout=3,
        pool_recycle=1800,
        pool_use_lifo=True,
        hide_parameters=True,
        connect_args=CONNECT_ARGS | {"application_name": name[:63]},
    )


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        message = "All of this process's database connections are busy."
        raise Unavailable(message, code="db_busy") from error
    except DBAPIError as error:
        if is_retryable(error):
            raise _unavailable(error.orig) from error
        raise


def is_retryable(error: DBAPIError) -> bool:
    """Whether the whole unit may be run again after this error."""
    state = getattr(error.orig, "sqlstate", None)
    if error.connection_invalidated or (state is None and _is_connection_error(error)):
        return True
    return state is not None and state.startswith(RETRYABLE)


def _is_connection_error(error: DBAPIError) -> bool:
    return isinstance(error.orig, psycopg.OperationalError | psycopg.InterfaceError)


def _unavailable(error: BaseException | None) -> Unavailable:
    state = getattr(error, "sqlstate", None)
    code = "storage_full" if state == "53100" else "db_unavailable"
    return Unavailable("The database cannot be reached right now.", code=code)
