"""Which version of a model serves, and which one is tried beside it."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "model_activations",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("at", _TIME, nullable=False),
        sa.Column("by", sa.String(64), nullable=False),
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("rolls_back", sa.Boolean, nullable=False),
        sa.Index("model_activations_by_model", "model"),
    )
    op.create_table(
        "model_shadows",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("at", _TIME, nullable=False),
        sa.Column("by", sa.String(64), nullable=False),
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("version", sa.Integer),
        sa.Column("digest", sa.String(64)),
        sa.Index("model_shadows_by_model", "model"),
    )
    op.create_table(
        "shadow_counts",
        sa.Column("shadow", sa.Integer, sa.ForeignKey("model_shadows.id"), primary_key=True),
        sa.Column("outcome", sa.String(32), primary_key=True),
        sa.Column("images", sa.Integer, nullable=False),
        sa.Column("score_difference", sa.Float, nullable=False),
        sa.Column("p_value_difference", sa.Float, nullable=False),
    )
