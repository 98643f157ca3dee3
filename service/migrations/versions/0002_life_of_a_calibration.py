"""Calibrations that are filled over time, for profiles; every activation is kept."""

from datetime import UTC, datetime

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_TIME = sa.DateTime(timezone=True)
_GRAPH = ("model", "version", "digest")


def upgrade() -> None:
    connection = op.get_bind()
    before = sa.Table("calibrations", sa.MetaData(), autoload_with=connection)
    old = connection.execute(sa.select(before).order_by(before.c.created)).mappings().all()
    # No key is in use yet, so that the old table can go and its rows come back in the new form.
    op.drop_table("calibrations")
    _create()
    for row in old:
        _insert(connection, row)


def _create() -> None:
    op.create_table(
        "calibrations",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("created", _TIME, nullable=False),
        sa.Column("created_by", sa.String(64), nullable=False),
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("profile", sa.String(64), nullable=False),
        sa.Column("source", sa.String(32)),
        sa.Column("finished", _TIME),
        sa.Column("target_fpr", sa.Float),
        sa.Column("confidence", sa.Float),
        sa.Column("achievable_fpr", sa.Float),
        sa.Column("threshold", sa.Float),
        sa.Column("sample_count", sa.Integer),
        sa.Column("quantiles", sa.JSON),
        sa.Column("tail", sa.JSON),
        sa.Column("deleted", _TIME),
        sa.Column("deleted_by", sa.String(64)),
        sa.Index("calibrations_by_graph", *_GRAPH),
        sa.Index("calibrations_by_time", "created"),
    )
    op.create_table(
        "samples",
        sa.Column(
            "calibration",
            sa.String(32),
            sa.ForeignKey("calibrations.id", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("pixels_sha256", sa.String(64)),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("score", sa.Float, nullable=False),
        sa.Column("engine", sa.String(64)),
        sa.Column("excluded", sa.Boolean, nullable=False),
        sa.Column("map", sa.LargeBinary),
        sa.UniqueConstraint("calibration", "pixels_sha256", name="samples_differ"),
        sa.Index("samples_by_score", "calibration", "score"),
    )
    op.create_table(
        "activations",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("at", _TIME, nullable=False),
        sa.Column("by", sa.String(64), nullable=False),
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("profile", sa.String(64), nullable=False),
        sa.Column("calibration", sa.String(32), sa.ForeignKey("calibrations.id")),
        sa.Column("rolls_back", sa.Boolean, nullable=False),
        sa.Index("activations_by_graph", *_GRAPH, "profile"),
    )


def _insert(connection: sa.Connection, old: sa.RowMapping) -> None:
    tables = sa.MetaData()
    tables.reflect(connection, only=("calibrations", "samples", "activations"))
    created = datetime.fromisoformat(old["created"]).astimezone(UTC)
    if connection.dialect.name == "sqlite":
        created = created.replace(tzinfo=None)
    graph = {name: old[name] for name in _GRAPH}
    told = ("id", "target_fpr", "achievable_fpr", "threshold", "sample_count", "quantiles")
    calibration = {name: old[name] for name in told}
    calibration |= {"created": created, "created_by": "", "profile": "", "finished": created}
    connection.execute(tables.tables["calibrations"].insert().values(**graph, **calibration))
    rows = [{**one, "calibration": old["id"], "excluded": False} for one in old["samples"]]
    if rows:
        connection.execute(tables.tables["samples"].insert(), rows)
    if old["active"]:
        activation = {"at": created, "by": "", "profile": "", "rolls_back": False}
        activation["calibration"] = old["id"]
        connection.execute(tables.tables["activations"].insert().values(**graph, **activation))
