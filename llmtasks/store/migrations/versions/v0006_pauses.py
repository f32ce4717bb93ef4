"""Which functions and queues are paused, by whom and why

Revision ID: 0006
Revises: 0005
"""

import sqlalchemy as sa

from llmtasks.store.columns import LongText, UtcDateTime
from llmtasks.store.migrations import steps

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    steps.create_table(
        "llmtasks_pauses",
        sa.Column("app", sa.String(length=100), nullable=False),
        sa.Column("kind", sa.String(length=10), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("paused_at", UtcDateTime(), nullable=False),
        sa.Column("paused_by", sa.String(length=200), nullable=True),
        sa.Column("reason", LongText(), nullable=True),
        sa.PrimaryKeyConstraint("app", "kind", "name"),
    )


def downgrade() -> None:
    steps.drop_table("llmtasks_pauses")
