"""The schema: what the migration makes is what the code expects, and it lets nothing illegal in."""

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.dialects.postgresql.base import ischema_names
from sqlalchemy.exc import DBAPIError
from support.databases import PASSWORD, TestDatabase, migration_settings

from tuneyard.models.migration import downgrade, migrate, upgrade
from tuneyard.models.tables import Row, Xid8
from tuneyard.specs.states import moves


def test_tables_in_the_code_are_those_of_the_migration(db: TestDatabase) -> None:
    ischema_names["xid8"] = Xid8  # SQLAlchemy does not know this type by itself
    with db.owner.begin() as tx:
        context = MigrationContext.configure(tx, opts={"compare_type": True})
        different = [
            change
            for change in compare_metadata(context, Row.metadata)
            # Constraints and defaults live in SQL alone; names, types and nullability in both.
            if isinstance(change, list) or change[0] not in IN_SQL_ALONE
        ]
    changes = [c for group in different for c in (group if isinstance(group, list) else [group])]
    assert [c for c in changes if c[0] != "modify_default"] == []


IN_SQL_ALONE = {"remove_index", "remove_constraint", "remove_fk", "remove_table"}


def test_moves_in_the_database_are_those_of_the_code(db: TestDatabase) -> None:
    rows = db.rows("SELECT from_state, event, to_state FROM transitions")
    assert {tuple(row) for row in rows} == {(f.value, e.value, t.value) for f, e, t in moves()}


def test_migrating_down_and_up_again_works(db: TestDatabase) -> None:
    with db.owner.begin() as tx:
        downgrade(tx, "base")
    assert [r.relname for r in db.rows("SELECT relname FROM pg_class WHERE relname = 'jobs'")] == []
    with db.owner.begin() as tx:
        upgrade(tx)
    assert db.rows("SELECT count(*) FROM jobs")[0][0] == 0


def test_each_step_can_be_undone_and_made_again(db: TestDatabase) -> None:
    for revision in ("0004", "0003", "0002", "0001"):
        with db.owner.begin() as tx:
            downgrade(tx, revision)
    columns = (
        "SELECT 1 FROM information_schema.columns WHERE column_name IN ('log_artifact', 'work_key')"
    )
    assert db.rows(columns) == []
    assert db.rows("SELECT relname FROM pg_class WHERE relname = 'node_cache'") == []
    with db.owner.begin() as tx:
        upgrade(tx)
    assert len(db.rows(columns)) == 2


def test_migrating_twice_changes_nothing(db: TestDatabase) -> None:
    settings = migration_settings(db.server.plan.url(database=db.name))
    migrate(settings)
    migrate(settings)
    assert db.rows("SELECT count(*) FROM api_keys")[0][0] == 1


@pytest.mark.parametrize("role", ["api", "worker", "scheduler"])
def test_no_role_sits_in_a_transaction_for_long(db: TestDatabase, role: str) -> None:
    with psycopg.connect(db.url(role)) as connection:
        shown = connection.execute("SHOW idle_in_transaction_session_timeout").fetchone()
    assert shown == ("5s",)


@pytest.mark.parametrize("table", ["api_keys", "teams"])
@pytest.mark.parametrize("role", ["api", "worker", "scheduler"])
def test_no_role_but_the_owner_reads_keys(db: TestDatabase, role: str, table: str) -> None:
    refused = pytest.raises(psycopg.errors.InsufficientPrivilege)
    with psycopg.connect(db.url(role)) as connection, refused:
        connection.execute(f"SELECT * FROM {table}")


def test_a_role_cannot_log_in_with_another_password(db: TestDatabase) -> None:
    url = db.url("api").replace(PASSWORD, "wrong")
    with pytest.raises(psycopg.OperationalError, match="authentication failed"):
        psycopg.connect(url)


def test_roles_do_not_wait_for_ever(db: TestDatabase) -> None:
    migrate(migration_settings(db.server.plan.url(database=db.name)))
    with db.owner.begin() as tx:
        downgrade(tx, "base")
        upgrade(tx)
    with psycopg.connect(db.url("worker")) as connection:
        shown = connection.execute("SHOW statement_timeout").fetchone()
    assert shown == ("10s",)


def test_an_illegal_move_cannot_be_written_even_by_the_owner(db, a_team) -> None:  # type: ignore[no-untyped-def]
    job = insert_job(db, a_team())
    with pytest.raises(DBAPIError, match="cannot go from queued to succeeded"):
        db.run("UPDATE jobs SET state = 'succeeded', finished_at = now() WHERE id = :id", id=job)


def insert_job(db: TestDatabase, team):  # type: ignore[no-untyped-def]
    """A bare row in ``queued``."""
    from tuneyard.specs.ids import new_id

    job = new_id()
    db.run(
        "INSERT INTO jobs (id, team_id, kind, name, spec, state, demand)"
        " VALUES (:id, :team, 'download', 'x', '{}', 'queued', '{\"kind\": \"cpu\"}')",
        id=job,
        team=team,
    )
    return job
