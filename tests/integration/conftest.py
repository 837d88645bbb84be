"""One real PostgreSQL and one Valkey a session; a fresh database a test, cloned from a template."""

import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import pytest
from support.apis import Api, serve
from support.databases import PASSWORD, TestDatabase, migration_settings, run_statement
from support.object_stores import ObjectServer

from tuneyard.local.postgres import RunningPostgres, start_postgres
from tuneyard.local.valkey import RunningValkey, start_valkey
from tuneyard.models.engine import Database
from tuneyard.models.migration import migrate
from tuneyard.models.nodes import OfferedDevice, register_node

TEMPLATE = "template_tuneyard"

# Role settings (timeouts) belong to a database by name, and a clone does not inherit them.
COPY_ROLE_SETTINGS = f"""
    DO $$ DECLARE one record; BEGIN
        FOR one IN
            SELECT r.rolname AS role, split_part(entry, '=', 1) AS name,
                   split_part(entry, '=', 2) AS value
            FROM pg_db_role_setting s JOIN pg_roles r ON r.oid = s.setrole
            JOIN pg_database d ON d.oid = s.setdatabase, unnest(s.setconfig) AS entry
            WHERE d.datname = '{TEMPLATE}'
        LOOP
            EXECUTE format('ALTER ROLE %I IN DATABASE %I SET %I = %L',
                           one.role, current_database(), one.name, one.value);
        END LOOP;
    END $$
"""


@pytest.fixture(scope="session")
def postgres() -> Iterator[RunningPostgres]:
    """A server for the whole session; without fsync, as nothing here outlives it."""
    with tempfile.TemporaryDirectory(prefix="ty-pg-") as folder:
        Path(folder).chmod(0o755)
        server = start_postgres(Path(folder) / "postgres", fsync=False, die_with_parent=True)
        run_statement(server.url, f"CREATE DATABASE {TEMPLATE}")
        migrate(migration_settings(server.plan.url(database=TEMPLATE)))
        yield server
        server.stop()


@pytest.fixture(scope="session")
def valkey() -> Iterator[RunningValkey]:
    """A Valkey for the whole session."""
    with tempfile.TemporaryDirectory(prefix="ty-valkey-") as folder:
        server = start_valkey(Path(folder) / "valkey", die_with_parent=True)
        yield server
        server.stop()


@pytest.fixture(scope="session")
def object_server() -> Iterator[ObjectServer]:
    """An S3-compatible server for the whole session, with a bucket."""
    with tempfile.TemporaryDirectory(prefix="ty-s3-") as folder:
        server = ObjectServer(Path(folder))
        server.start()
        server.make_bucket()
        yield server
        server.kill()


@contextmanager
def fresh_database(postgres: RunningPostgres) -> Iterator[TestDatabase]:
    """A migrated database that is dropped afterwards."""
    name = f"test_{secrets.token_hex(6)}"
    plan = postgres.plan
    run_statement(postgres.url, f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
    run_statement(plan.url(database=name), COPY_ROLE_SETTINGS)
    roles = {
        role: Database(plan.url(f"tuneyard_{role}", PASSWORD, name), f"test-{role}")
        for role in ("api", "worker", "scheduler")
    }
    database = TestDatabase(
        postgres, name, Database(plan.url(database=name), "test-owner"), **roles
    )
    yield database
    for each in (database.owner, *roles.values()):
        each.close()
    run_statement(postgres.url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def db(postgres: RunningPostgres) -> Iterator[TestDatabase]:
    """A fresh, migrated database."""
    with fresh_database(postgres) as database:
        yield database


@pytest.fixture(scope="module")
def shared_db(postgres: RunningPostgres) -> Iterator[TestDatabase]:
    """A database for all tests of a module."""
    with fresh_database(postgres) as database:
        yield database


@pytest.fixture
def a_team(db: TestDatabase) -> Callable[..., UUID]:
    """Make a team."""
    return db.a_team


@pytest.fixture
def a_node(db: TestDatabase) -> Callable[..., UUID]:
    """Register a node with some GPUs and one CPU slot."""

    def make(name: str = "n1", *, gpus: int = 2, cpu_slots: int = 1) -> UUID:
        devices = [
            OfferedDevice("gpu", f"GPU-{name}-{i}", "test", 2**34, [[0]]) for i in range(gpus)
        ]
        if cpu_slots:
            devices.append(OfferedDevice("cpu", "cpu", "cores", 2**34, [[0]] * cpu_slots))
        with db.worker.begin() as tx:
            return register_node(tx, name, boot_id="boot", capabilities={}, devices=devices)

    return make


@pytest.fixture
def api(db: TestDatabase, tmp_path: Path) -> Iterator[Api]:
    """The API over a fresh database, on a port of its own."""
    with serve(db, tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def shared_api(
    postgres: RunningPostgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Api]:
    """One API for all tests of a module that ask and leave nothing."""
    home = tmp_path_factory.mktemp("shared")
    with fresh_database(postgres) as database, serve(database, home) as running:
        yield running
