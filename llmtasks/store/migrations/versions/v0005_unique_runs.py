"""Which run has which key of a unique function

Revision ID: 0005
Revises: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "llmtasks_unique",
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("run_id", sa.String(length=255), nullable=False),
        sa.PrimaryKeyConstraint("key"),
    )
    op.create_index("ix_llmtasks_unique_run", "llmtasks_unique", ["run_id"], unique=False)


def downgrade() -> None:
    op.drop_index("ix_llmtasks_unique_run", table_name="llmtasks_unique")
    op.drop_table("llmtasks_unique")
