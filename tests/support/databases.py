"""Databases of tests: a server's URL by role, and short ways to read and write as the owner."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import psycopg
from pydantic import SecretStr
from sqlalchemy import text

from tuneyard.local.postgres import RunningPostgres
from tuneyard.models.engine import Database
from tuneyard.specs.ids import new_id
from tuneyard.specs.settings import Settings

PASSWORD = "in-tests-only"


def migration_settings(url: str) -> Settings:
    """What `tuneyard migrate` needs, with one password for all roles."""
    return Settings(
        database_url=SecretStr(url),
        api_role_password=SecretStr(PASSWORD),
        worker_role_password=SecretStr(PASSWORD),
        scheduler_role_password=SecretStr(PASSWORD),
        first_api_key=SecretStr("ty-first-key-of-the-tests"),
    )


def run_statement(url: str, statement: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement)


@dataclass(frozen=True)
class TestDatabase:
    """A database of a test's own, as each role and as its owner."""

    __test__ = False
    server: RunningPostgres
    name: str
    owner: Database
    api: Database
    worker: Database
    scheduler: Database

    def url(self, role: str) -> str:
        """The URL of one role: api, worker or scheduler."""
        return self.server.plan.url(f"tuneyard_{role}", PASSWORD, self.name)

    def rows(self, sql: str, **values: Any) -> list[Any]:
        """What the owner reads."""
        with self.owner.begin() as tx:
            return list(tx.execute(text(sql), values))

    def run(self, sql: str, **values: Any) -> None:
        """What the owner writes."""
        with self.owner.begin() as tx:
            tx.execute(text(sql), values)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Let nobody in, and turn out whoever is, until the block ends."""
        allow = f"ALTER DATABASE {self.name} ALLOW_CONNECTIONS"
        run_statement(self.server.url, f"{allow} false")
        turn_out = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname ="
        run_statement(self.server.url, f"{turn_out} '{self.name}'")
        yield
        run_statement(self.server.url, f"{allow} true")

    def a_team(self, name: str | None = None) -> UUID:
        """Make a team."""
        team = new_id()
        self.run("INSERT INTO teams (id, name) VALUES (:id, :n)", id=team, n=name or team.hex[-8:])
        return team
