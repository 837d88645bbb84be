"""Where the API reaches a node's gateway, and the token of its worker's present life.

Revision ID: 0007
"""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Nullable: a worker of an earlier release registers without a gateway."""
    op.execute("ALTER TABLE nodes ADD COLUMN gateway_url text, ADD COLUMN gateway_token text")


def downgrade() -> None:
    """Forget the addresses; workers write them anew."""
    op.execute("ALTER TABLE nodes DROP COLUMN gateway_url, DROP COLUMN gateway_token")
