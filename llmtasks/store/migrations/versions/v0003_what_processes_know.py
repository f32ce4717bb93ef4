"""What processes know, the clocks of their hosts, since when a schedule is paused

Revision ID: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op

from llmtasks.store.rows import UtcDateTime

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("llmtasks_processes", sa.Column("functions", sa.Text(), nullable=True))
    op.add_column("llmtasks_processes", sa.Column("clock_offset", sa.Float(), nullable=True))
    op.add_column("llmtasks_schedules", sa.Column("paused_at", UtcDateTime(), nullable=True))


def downgrade() -> None:
    op.drop_column("llmtasks_schedules", "paused_at")
    op.drop_column("llmtasks_processes", "clock_offset")
    op.drop_column("llmtasks_processes", "functions")
