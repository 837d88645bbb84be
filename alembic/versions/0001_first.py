"""The first schema: tables, constraints, roles, row level security.

Revision ID: 0001
"""

from pathlib import Path

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

ROLES = ("tuneyard_api", "tuneyard_worker", "tuneyard_scheduler")

ROLE_SETTINGS = {
    # The defaults of all of these are "for ever".
    "statement_timeout": "10s",
    "lock_timeout": "2s",
    "idle_in_transaction_session_timeout": "5s",
    "transaction_timeout": "20s",
    "tcp_keepalives_idle": "10",
    "client_connection_check_interval": "1s",
}

OF_A_TEAM = (
    "files",
    "jobs",
    "job_edges",
    "attempts",
    "events",
    "metrics",
    "log_chunks",
    "artifacts",
    "models",
    "idempotency_keys",
)
"""Tables with a team_id: the API sees its team's rows, the other roles what they are granted."""

GRANTS = {
    "tuneyard_api": {
        "SELECT": (
            "transitions, cluster, base_models, nodes, devices, slots, members, allocations, files,"
            " jobs, job_edges, attempts, events, metrics, log_chunks, artifacts, models,"
            " idempotency_keys"
        ),
        "INSERT": "files, jobs, job_edges, events, idempotency_keys",
        "UPDATE": "files, jobs, attempts, idempotency_keys",
        "DELETE": "idempotency_keys",
    },
    "tuneyard_worker": {
        "SELECT": (
            "transitions, cluster, base_models, nodes, devices, slots, members, allocations, files,"
            " jobs, job_edges, attempts, events, metrics, log_chunks, artifacts, models"
        ),
        "INSERT": (
            "base_models, nodes, devices, slots, events, metrics, log_chunks, artifacts, models"
        ),
        "UPDATE": (
            "base_models, nodes, devices, slots, members, allocations, jobs, attempts, artifacts,"
            " log_chunks"
        ),
        "DELETE": "log_chunks",
    },
    "tuneyard_scheduler": {
        "SELECT": (
            "transitions, cluster, leases, base_models, nodes, devices, slots, members,"
            " allocations, files, jobs, job_edges, attempts, events, artifacts, models"
        ),
        "INSERT": "attempts, members, allocations, events",
        "UPDATE": "leases, nodes, devices, members, allocations, jobs, attempts",
    },
}


def upgrade() -> None:
    """Make everything, in an empty database."""
    script = Path(__file__).with_suffix(".sql").read_text(encoding="utf-8")
    for statement in script.split("\n;\n"):
        op.execute(statement)
    for role in ROLES:
        _make_role(role)
    for table in OF_A_TEAM:
        _separate_teams(table)
    for role, privileges in GRANTS.items():
        for privilege, tables in privileges.items():
            op.execute(f"GRANT {privilege} ON {tables} TO {role}")
    op.execute("GRANT USAGE ON SEQUENCE attempt_token TO tuneyard_scheduler")
    for function in ("key_team(bytea)", "claim_unchecked_file(double precision)"):
        op.execute(f"REVOKE ALL ON FUNCTION {function} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION {function} TO tuneyard_api")


def _make_role(role: str) -> None:
    # Roles belong to the whole server: another database of it may have made them.
    op.execute(
        f"DO $$ BEGIN CREATE ROLE {role} LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$"
    )
    for name, value in ROLE_SETTINGS.items():
        op.execute(
            "DO $$ BEGIN EXECUTE format("
            f"'ALTER ROLE {role} IN DATABASE %I SET {name} = ''{value}''', current_database());"
            " END $$"
        )
    op.execute(f"GRANT USAGE ON SCHEMA public TO {role}")


def _separate_teams(table: str) -> None:
    op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    # A pooled connection has '' where a team was set before: nullif makes it match nothing.
    mine = "team_id = nullif(current_setting('tuneyard.team', true), '')::uuid"
    op.execute(f"CREATE POLICY own_team ON {table} TO tuneyard_api USING ({mine})")
    op.execute(
        f"CREATE POLICY all_teams ON {table} TO tuneyard_worker, tuneyard_scheduler USING (true)"
    )


def downgrade() -> None:
    """Remove everything but the roles, which other databases of the server may use."""
    for role in ROLES:
        op.execute(f"DROP OWNED BY {role}")
    op.execute("DROP FUNCTION key_team(bytea), claim_unchecked_file(double precision)")
    op.execute(
        "DROP TABLE idempotency_keys, models, base_models, artifacts, log_chunks,"
        " metrics, events, allocations, members, attempts, slots, devices, nodes, job_edges, jobs,"
        " files, api_keys, teams, leases, cluster, transitions"
    )
    op.execute("DROP FUNCTION check_transition()")
    op.execute("DROP SEQUENCE attempt_token")
