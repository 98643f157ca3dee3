"""What changes after export and must survive a restart: calibrations and which one is active."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import make_url

from service.calibration import Calibration
from service.errors import SettingsError

metadata = sa.MetaData()
calibrations = sa.Table(
    "calibrations",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("created", sa.String(32), nullable=False),  # UTC, ISO 8601: sorts as text
    sa.Column("model", sa.String(64), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("target_fpr", sa.Float, nullable=False),
    sa.Column("threshold", sa.Float, nullable=False),
    sa.Column("samples", sa.JSON, nullable=False),
    sa.Column("active", sa.Boolean, nullable=False),
    sa.Index("calibrations_by_digest", "digest", "active"),
)


@dataclass(frozen=True)
class Sample:
    """One normal image of a calibration; the image itself is not kept."""

    name: str
    sha256: str
    score: float


@dataclass(frozen=True)
class StoredCalibration:
    id: str
    created: datetime
    model: str
    version: int
    digest: str
    active: bool
    samples: list[Sample]
    calibration: Calibration


class Store:
    """Calibrations in SQLite, or any database that SQLAlchemy's URL names.

    Raises SettingsError where the database can't be opened.
    """

    def __init__(self, url: str) -> None:
        try:
            parsed = make_url(url)
            if parsed.get_backend_name() == "sqlite" and parsed.database:
                Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
            self._engine = sa.create_engine(parsed)
            if parsed.get_backend_name() == "sqlite":
                sa.event.listen(self._engine, "connect", _write_ahead)
            metadata.create_all(self._engine)
        except (sa.exc.SQLAlchemyError, OSError, ImportError) as error:
            raise SettingsError(f"database {url}: {error}") from error

    def add(
        self,
        model: str,
        version: int,
        digest: str,
        calibration: Calibration,
        samples: list[Sample],
        *,
        activate: bool,
    ) -> StoredCalibration:
        """Keep a calibration; activating it replaces the one active for the same graph."""
        stored = StoredCalibration(
            id=calibration.id,
            created=datetime.now(UTC),
            model=model,
            version=version,
            digest=digest,
            active=activate,
            samples=samples,
            calibration=calibration,
        )
        with self._begin() as connection:
            if activate:
                connection.execute(
                    calibrations.update()
                    .where(calibrations.c.digest == digest)
                    .values(active=False)
                )
            connection.execute(
                calibrations.insert().values(
                    id=stored.id,
                    created=stored.created.isoformat(),
                    model=model,
                    version=version,
                    digest=digest,
                    target_fpr=calibration.target_fpr,
                    threshold=calibration.threshold,
                    samples=[vars(sample) for sample in samples],
                    active=activate,
                )
            )
        return stored

    def list(self, model: str | None = None) -> list[StoredCalibration]:
        """All calibrations, or those of one model, newest first."""
        query = sa.select(calibrations).order_by(calibrations.c.created.desc())
        if model is not None:
            query = query.where(calibrations.c.model == model)
        with self._begin() as connection:
            return [_stored(row) for row in connection.execute(query)]

    def active(self, digest: str) -> StoredCalibration | None:
        """The active calibration of a graph; those of other graphs never apply to it."""
        query = sa.select(calibrations).where(
            calibrations.c.digest == digest, calibrations.c.active
        )
        with self._begin() as connection:
            row = connection.execute(query).first()
        return _stored(row) if row else None

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _begin(self) -> Iterator[sa.Connection]:
        with self._engine.begin() as connection:
            yield connection


def new_id() -> str:
    return f"cal_{secrets.token_hex(8)}"


def _stored(row: Any) -> StoredCalibration:
    samples = [Sample(**sample) for sample in row.samples]
    scores = np.array([sample.score for sample in samples])
    return StoredCalibration(
        id=row.id,
        created=datetime.fromisoformat(row.created),
        model=row.model,
        version=row.version,
        digest=row.digest,
        active=row.active,
        samples=samples,
        calibration=Calibration(row.id, row.target_fpr, scores),
    )


def _write_ahead(connection: Any, record: Any) -> None:
    """Readers never wait for a writer, and a commit survives a crash."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA busy_timeout=5000")
