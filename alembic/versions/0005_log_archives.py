"""An ended attempt's log as one artifact.

Down: logs that were archived are no longer shown; their files stay in the store until its sweep.

Revision ID: 0005
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Let an attempt name its log's artifact, and find those that have none yet."""
    op.execute("ALTER TABLE attempts ADD COLUMN log_artifact uuid")
    op.execute(
        "ALTER TABLE attempts ADD CONSTRAINT attempts_log_artifact"
        " FOREIGN KEY (team_id, log_artifact) REFERENCES artifacts (team_id, id)"
    )
    op.execute(
        "CREATE INDEX attempts_log_in_chunks ON attempts (ended_at)"
        " WHERE ended_at IS NOT NULL AND log_offset > 0 AND log_artifact IS NULL"
    )


def downgrade() -> None:
    """Forget the archives: rows, index and column."""
    op.execute("ALTER TABLE attempts DROP COLUMN log_artifact")
    op.execute("DELETE FROM artifacts WHERE kind = 'log'")
