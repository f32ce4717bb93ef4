"""Totals of past hours

Revision ID: 0004
Revises: 0003
"""

import sqlalchemy as sa

from llmtasks.store.columns import UtcDateTime
from llmtasks.store.migrations import steps

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    steps.create_table(
        "llmtasks_totals",
        sa.Column("app", sa.String(100), nullable=False),
        sa.Column("hour", UtcDateTime(), nullable=False),
        sa.Column("func_name", sa.String(200), nullable=False),
        sa.Column("state", sa.String(12), nullable=False),
        sa.Column("runs", sa.Integer(), nullable=False),
        sa.Column("retries", sa.Integer(), nullable=False),
        sa.Column("losses", sa.Integer(), nullable=False),
        sa.Column("run_seconds", sa.Double(), nullable=False),
        sa.Column("timed", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("app", "hour", "func_name", "state"),
    )
    steps.create_table(
        "llmtasks_summed",
        sa.Column("app", sa.String(100), nullable=False),
        sa.Column("until", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("app"),
    )


def downgrade() -> None:
    steps.drop_table("llmtasks_summed")
    steps.drop_table("llmtasks_totals")
