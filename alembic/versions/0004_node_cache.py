"""What each node has in its cache.

Revision ID: 0004
"""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add a table that workers write and the scheduler reads."""
    op.execute("""
        CREATE TABLE node_cache (
            node_id uuid NOT NULL REFERENCES nodes (id),
            digest text NOT NULL CHECK (digest ~ '^[0-9a-f]{64}$'),
            bytes bigint NOT NULL CHECK (bytes >= 0),
            used_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            PRIMARY KEY (node_id, digest)
        )
    """)
    op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON node_cache TO tuneyard_worker")
    op.execute("GRANT SELECT ON node_cache TO tuneyard_scheduler, tuneyard_api")


def downgrade() -> None:
    """Remove it."""
    op.execute("DROP TABLE node_cache")
