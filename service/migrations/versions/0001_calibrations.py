"""Calibrations in one table, as the first services kept them without migrations."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    if sa.inspect(op.get_bind()).has_table("calibrations"):
        return
    op.create_table(
        "calibrations",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("created", sa.String(32), nullable=False),
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("active", sa.Boolean, nullable=False),
        sa.Column("target_fpr", sa.Float, nullable=False),
        sa.Column("achievable_fpr", sa.Float, nullable=False),
        sa.Column("threshold", sa.Float, nullable=False),
        sa.Column("sample_count", sa.Integer, nullable=False),
        sa.Column("quantiles", sa.JSON, nullable=False),
        sa.Column("samples", sa.JSON, nullable=False),
        sa.Index("calibrations_by_graph", "model", "version", "digest", "active"),
        sa.Index("calibrations_by_time", "created"),
    )
