"""What overlap policies, max_runs and backfills need to know

Revision ID: 0002
Revises: 0001
"""

import sqlalchemy as sa

from llmtasks.store.columns import UtcDateTime
from llmtasks.store.migrations import steps

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    steps.add_column("llmtasks_schedules", sa.Column("starts_at", UtcDateTime(), nullable=True))
    steps.add_column(
        "llmtasks_schedules", sa.Column("fired", sa.Integer(), server_default=sa.text("0"), nullable=False)
    )
    steps.add_column(
        "llmtasks_runs", sa.Column("backfilled", sa.Boolean(), server_default=sa.text("'0'"), nullable=False)
    )
    steps.create_index(
        "ix_llmtasks_runs_unfinished",
        "llmtasks_runs",
        ["schedule_id", "delivered"],
        sqlite_where=sa.text("schedule_id IS NOT NULL AND delivered = 0"),
        postgresql_where=sa.text("schedule_id IS NOT NULL AND NOT delivered"),
    )


def downgrade() -> None:
    steps.drop_index("ix_llmtasks_runs_unfinished", "llmtasks_runs")
    steps.drop_column("llmtasks_runs", "backfilled")
    steps.drop_column("llmtasks_schedules", "fired")
    steps.drop_column("llmtasks_schedules", "starts_at")
