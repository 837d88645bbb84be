"""Jobs that do work for others are found by what they do.

Revision ID: 0003
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """One job for the same work of a team, unless it failed; every job's inputs are an object."""
    op.execute(
        "UPDATE jobs SET inputs = '{}' WHERE inputs IS NULL OR jsonb_typeof(inputs) = 'null'"
    )
    op.execute(
        "ALTER TABLE jobs ALTER COLUMN inputs SET DEFAULT '{}', ALTER COLUMN inputs SET NOT NULL"
    )
    op.execute("ALTER TABLE jobs ADD COLUMN work_key text")
    op.execute(
        "CREATE UNIQUE INDEX jobs_work_once ON jobs (team_id, work_key)"
        " WHERE state NOT IN ('failed', 'cancelled')"
    )
    op.execute("CREATE INDEX jobs_by_pipeline ON jobs (pipeline_id) WHERE pipeline_id IS NOT NULL")


def downgrade() -> None:
    """Back to jobs that stand alone."""
    op.execute("DROP INDEX jobs_by_pipeline, jobs_work_once")
    op.execute("ALTER TABLE jobs DROP COLUMN work_key, ALTER COLUMN inputs DROP NOT NULL")
