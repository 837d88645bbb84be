"""Models that stand alone beside adapters, and which adapter went into them.

Only adds: rows that a release before this one writes are adapters, as the default says.

Revision ID: 0006
"""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Tell whole models from adapters."""
    op.execute(
        "ALTER TABLE models"
        " ADD COLUMN kind text NOT NULL DEFAULT 'adapter'"
        " CONSTRAINT models_kind_known CHECK (kind IN ('adapter', 'model')),"
        " ADD COLUMN adapter_artifact_id uuid,"
        " ADD CONSTRAINT models_adapter_of_the_team FOREIGN KEY (team_id, adapter_artifact_id)"
        " REFERENCES artifacts (team_id, id),"
        # An adapter is made of rows of data, a merged model of an adapter.
        " ADD CONSTRAINT models_merged_is_whole"
        " CHECK (adapter_artifact_id IS NULL OR kind = 'model')"
    )


def downgrade() -> None:
    """Merged models have no place in the older schema: their rows go, their folders stay."""
    op.execute("DELETE FROM models WHERE kind <> 'adapter' OR parent_model_id IS NOT NULL")
    op.execute("ALTER TABLE models DROP COLUMN adapter_artifact_id, DROP COLUMN kind")
