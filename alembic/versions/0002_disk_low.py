"""Nodes say when their disk is nearly full; a wait reason's time was read by nobody.

Revision ID: 0002
"""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Nothing is placed on a node whose disk is low."""
    op.execute("ALTER TABLE nodes ADD COLUMN disk_low boolean NOT NULL DEFAULT false")
    op.execute("ALTER TABLE jobs DROP COLUMN wait_reason_at")


def downgrade() -> None:
    """Back to the first schema."""
    op.execute("ALTER TABLE jobs ADD COLUMN wait_reason_at timestamptz")
    op.execute("ALTER TABLE nodes DROP COLUMN disk_low")
