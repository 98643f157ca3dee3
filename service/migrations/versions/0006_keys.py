"""API keys, by the hashes of their tokens."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "keys",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("scope", sa.String(16), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False, unique=True),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires", sa.DateTime(timezone=True)),
        sa.Column("revoked", sa.DateTime(timezone=True)),
        sa.Column("max_rate", sa.Float),
    )
    in_force = sa.text("revoked IS NULL")
    op.create_index(
        "keys_in_force",
        "keys",
        ["name"],
        unique=True,
        sqlite_where=in_force,
        postgresql_where=in_force,
    )
