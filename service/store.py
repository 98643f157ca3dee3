"""What changes after export and must survive a restart: calibrations and which one is active."""

import logging
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import make_url

from service.calibration import Calibration
from service.errors import SettingsError

log = logging.getLogger(__name__)

metadata = sa.MetaData()
calibrations = sa.Table(
    "calibrations",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("created", sa.String(32), nullable=False),  # UTC, ISO 8601: sorts as text
    sa.Column("model", sa.String(64), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("active", sa.Boolean, nullable=False),
    sa.Column("target_fpr", sa.Float, nullable=False),
    sa.Column("achievable_fpr", sa.Float, nullable=False),
    sa.Column("threshold", sa.Float, nullable=False),
    sa.Column("sample_count", sa.Integer, nullable=False),
    sa.Column("quantiles", sa.JSON, nullable=False),
    sa.Column("samples", sa.JSON, nullable=False),  # large: read for the active one alone
    sa.Index("calibrations_by_graph", "model", "version", "digest", "active"),
    sa.Index("calibrations_by_time", "created"),
)


@dataclass(frozen=True)
class Sample:
    """One normal image of a calibration; the image itself is not kept."""

    name: str
    sha256: str
    score: float


@dataclass(frozen=True)
class Graph:
    """What a calibration is bound to: no other graph, version or model ever gets it."""

    model: str
    version: int
    digest: str


@dataclass(frozen=True)
class StoredCalibration:
    """A calibration as it is listed: everything but its samples."""

    id: str
    created: datetime
    graph: Graph
    active: bool
    target_fpr: float
    achievable_fpr: float
    threshold: float
    sample_count: int
    quantiles: dict[str, float]


class Store:
    """Calibrations in SQLite, or any database that SQLAlchemy's URL names.

    Raises SettingsError where the database can't be opened.
    """

    def __init__(self, url: str) -> None:
        try:
            parsed = make_url(url)
        except sa.exc.ArgumentError:
            raise SettingsError(
                "database_url is no SQLAlchemy URL (sqlite:///file.sqlite)"
            ) from None
        try:
            if parsed.get_backend_name() == "sqlite" and parsed.database:
                Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
            self._engine = sa.create_engine(parsed)
            if parsed.get_backend_name() == "sqlite":
                sa.event.listen(self._engine, "connect", _write_ahead)
            if not sa.inspect(self._engine).has_table(calibrations.name):
                log.warning(
                    "new database %s: no calibrations yet, every model starts with its bundle's "
                    "own threshold",
                    parsed.render_as_string(hide_password=True),
                )
            metadata.create_all(self._engine)
        except (sa.exc.SQLAlchemyError, OSError, ImportError) as error:
            shown = parsed.render_as_string(hide_password=True)
            raise SettingsError(f"database {shown}: {error}") from error

    def add(
        self, graph: Graph, calibration: Calibration, samples: list[Sample], *, activate: bool
    ) -> StoredCalibration:
        """Keep a calibration; activating it replaces the one active for the same graph."""
        values = {
            "id": calibration.id,
            "created": datetime.now(UTC).isoformat(),
            **vars(graph),
            "active": activate,
            "target_fpr": calibration.target_fpr,
            "achievable_fpr": calibration.achievable_fpr,
            "threshold": calibration.threshold,
            "sample_count": calibration.samples,
            "quantiles": calibration.quantiles(),
        }
        with self._engine.begin() as connection:
            if activate:
                _deactivate(connection, graph)
            stored = [vars(sample) for sample in samples]
            connection.execute(calibrations.insert().values(**values, samples=stored))
        return _listed(SimpleNamespace(**values))

    def list(self, model: str | None = None, limit: int = 100) -> list[StoredCalibration]:
        """Calibrations, or those of one model, newest first."""
        query = sa.select(*_LISTED).order_by(calibrations.c.created.desc()).limit(limit)
        if model is not None:
            query = query.where(calibrations.c.model == model)
        with self._engine.begin() as connection:
            return [_listed(row) for row in connection.execute(query)]

    def get(self, id: str) -> StoredCalibration | None:
        query = sa.select(*_LISTED).where(calibrations.c.id == id)
        with self._engine.begin() as connection:
            row = connection.execute(query).first()
        return _listed(row) if row else None

    def activate(self, calibration: StoredCalibration) -> None:
        """Make it the active one of its graph."""
        with self._engine.begin() as connection:
            _deactivate(connection, calibration.graph)
            chosen = calibrations.c.id == calibration.id
            connection.execute(calibrations.update().where(chosen).values(active=True))

    def deactivate(self, graph: Graph) -> None:
        """Leave a graph without an active calibration: its bundle's own threshold applies."""
        with self._engine.begin() as connection:
            _deactivate(connection, graph)

    def active(self, graph: Graph) -> Calibration | None:
        """The active calibration of a graph, with the threshold that was told when it was made."""
        query = sa.select(calibrations).where(*_of(graph), calibrations.c.active)
        with self._engine.begin() as connection:
            row = connection.execute(query).first()
        if row is None:
            return None
        scores = np.array([sample["score"] for sample in row.samples])
        return Calibration(row.id, row.target_fpr, scores, row.threshold)

    def close(self) -> None:
        self._engine.dispose()


def new_id() -> str:
    return f"cal_{secrets.token_hex(8)}"


_LISTED = [column for column in calibrations.c if column.name != "samples"]


def _of(graph: Graph) -> list[sa.ColumnElement[bool]]:
    return [calibrations.c[name] == value for name, value in vars(graph).items()]


def _deactivate(connection: sa.Connection, graph: Graph) -> None:
    connection.execute(calibrations.update().where(*_of(graph)).values(active=False))


def _listed(row: Any) -> StoredCalibration:
    return StoredCalibration(
        id=row.id,
        created=datetime.fromisoformat(row.created),
        graph=Graph(row.model, row.version, row.digest),
        active=row.active,
        target_fpr=row.target_fpr,
        achievable_fpr=row.achievable_fpr,
        threshold=row.threshold,
        sample_count=row.sample_count,
        quantiles=row.quantiles,
    )


def _write_ahead(connection: Any, record: Any) -> None:
    """Readers never wait for a writer, and a commit survives a crash."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA busy_timeout=5000")
