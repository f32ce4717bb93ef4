"""Which run has which key of a unique function

Revision ID: 0005
Revises: 0004
"""

import sqlalchemy as sa

from llmtasks.store.migrations import steps

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    steps.create_table(
        "llmtasks_unique",
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("run_id", sa.String(length=255), nullable=False),
        sa.PrimaryKeyConstraint("key"),
    )
    steps.create_index("ix_llmtasks_unique_run", "llmtasks_unique", ["run_id"])


def downgrade() -> None:
    steps.drop_table("llmtasks_unique")
