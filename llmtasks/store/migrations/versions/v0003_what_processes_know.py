"""What processes know, the clocks of their hosts, since when a schedule is paused

Revision ID: 0003
Revises: 0002
"""

import sqlalchemy as sa

from llmtasks.store.columns import LongText, UtcDateTime
from llmtasks.store.migrations import steps

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    steps.add_column("llmtasks_processes", sa.Column("functions", LongText(), nullable=True))
    steps.add_column("llmtasks_processes", sa.Column("clock_offset", sa.Double(), nullable=True))
    steps.add_column("llmtasks_schedules", sa.Column("paused_at", UtcDateTime(), nullable=True))


def downgrade() -> None:
    steps.drop_column("llmtasks_schedules", "paused_at")
    steps.drop_column("llmtasks_processes", "clock_offset")
    steps.drop_column("llmtasks_processes", "functions")
