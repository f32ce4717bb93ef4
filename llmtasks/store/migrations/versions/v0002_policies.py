"""What overlap policies, max_runs and backfills need to know

Revision ID: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op

from llmtasks.store.rows import UtcDateTime

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("llmtasks_schedules", sa.Column("starts_at", UtcDateTime(), nullable=True))
    op.add_column("llmtasks_schedules", sa.Column("fired", sa.Integer(), server_default=sa.text("0"), nullable=False))
    op.add_column("llmtasks_runs", sa.Column("backfilled", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.create_index(
        "ix_llmtasks_runs_unfinished",
        "llmtasks_runs",
        ["schedule_id"],
        unique=False,
        sqlite_where=sa.text("schedule_id IS NOT NULL AND delivered = 0"),
        postgresql_where=sa.text("schedule_id IS NOT NULL AND NOT delivered"),
    )


def downgrade() -> None:
    op.drop_index("ix_llmtasks_runs_unfinished", table_name="llmtasks_runs")
    op.drop_column("llmtasks_runs", "backfilled")
    op.drop_column("llmtasks_schedules", "fired")
    op.drop_column("llmtasks_schedules", "starts_at")
