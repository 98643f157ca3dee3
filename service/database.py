"""The database: SQLite beside the service, or PostgreSQL for several of them; its tables, and the
migrations that bring an older database up to them.

Writers of SQLite take its lock when they begin, so that none fails halfway for having read first.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url

from service.errors import DatabaseAway, SettingsError

log = logging.getLogger(__name__)
logging.getLogger("alembic").setLevel(logging.WARNING)  # else two lines at every start

_INSERTS: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
MIGRATIONS = Path(__file__).parent / "migrations"
_NEWEST = max(path.stem[:4] for path in (MIGRATIONS / "versions").glob("[0-9]*.py"))
_MIGRATION_LOCK = 0x5C24D4AD  # any number that all replicas agree on
_BUSY_S = 5  # how long a writer waits for another
_MIGRATION_S = 120  # how long a service that starts waits for another that migrates
_AWAY_S = 5  # how long to wait for a server that doesn't answer
_STATEMENT_MS = 30_000


class UtcTime(sa.types.TypeDecorator[datetime]):
    """A moment; SQLite has no time zones, so that there it is written in UTC without one."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        utc = value.astimezone(UTC)
        return utc.replace(tzinfo=None) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _graph() -> tuple[sa.Column[Any], ...]:
    """The columns that name a graph, as `store.Graph` does."""
    return (
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
    )


metadata = sa.MetaData()

calibrations = sa.Table(
    "calibrations",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("created", UtcTime, nullable=False),
    sa.Column("created_by", sa.String(64), nullable=False),
    *_graph(),
    sa.Column("profile", sa.String(64), nullable=False),  # "": the model's own
    sa.Column("source", sa.String(32)),  # the calibration whose samples it began with
    # All that follows is null until it is finished, and never changes afterwards.
    sa.Column("finished", UtcTime),
    sa.Column("target_fpr", sa.Float),
    sa.Column("confidence", sa.Float),
    sa.Column("achievable_fpr", sa.Float),
    sa.Column("threshold", sa.Float),
    sa.Column("sample_count", sa.Integer),
    sa.Column("quantiles", sa.JSON),
    sa.Column("tail", sa.JSON),
    # Nobody sees it in lists any more, but decisions that it made can still be traced to it.
    sa.Column("deleted", UtcTime),
    sa.Column("deleted_by", sa.String(64)),
    sa.Index("calibrations_by_graph", "model", "version", "digest"),
    sa.Index("calibrations_by_time", "created"),
)

samples = sa.Table(
    "samples",
    metadata,
    sa.Column(
        "calibration",
        sa.String(32),
        sa.ForeignKey("calibrations.id", ondelete="CASCADE"),
        primary_key=True,
    ),
    sa.Column("sha256", sa.String(64), primary_key=True),  # of the bytes that were sent
    sa.Column("pixels_sha256", sa.String(64)),  # of what the graph saw; null before version 2
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("score", sa.Float, nullable=False),
    sa.Column("engine", sa.String(64)),  # what the graph ran on; null before version 2
    sa.Column("excluded", sa.Boolean, nullable=False),
    sa.Column("map", sa.LargeBinary),  # of the highest scores, see `store`
    sa.UniqueConstraint("calibration", "pixels_sha256", name="samples_differ"),
    sa.Index("samples_by_score", "calibration", "score"),
)

# What is in force is the last row of a graph and profile; so that a change is one insertion, and
# who changed what when is never lost.
activations = sa.Table(
    "activations",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("at", UtcTime, nullable=False),
    sa.Column("by", sa.String(64), nullable=False),
    *_graph(),
    sa.Column("profile", sa.String(64), nullable=False),
    sa.Column("calibration", sa.String(32), sa.ForeignKey("calibrations.id")),  # null: bundle's
    sa.Column("rolls_back", sa.Boolean, nullable=False),
    sa.Index("activations_by_graph", "model", "version", "digest", "profile"),
)

# Sorted byte by byte, whatever the language of a PostgreSQL server: an id's order is its time's.
_InspectionId = sa.String(32).with_variant(sa.String(32, collation="C"), "postgresql")

inspections = sa.Table(
    "inspections",
    metadata,
    sa.Column("id", _InspectionId, primary_key=True),
    sa.Column("at", UtcTime, nullable=False),
    sa.Column("request_id", sa.String(128), nullable=False),
    sa.Column("by", sa.String(64), nullable=False),
    *_graph(),
    sa.Column("calibration", sa.String(32)),  # null: the model had none
    sa.Column("profile", sa.String(64), nullable=False),  # "": none was named
    sa.Column("sha256", sa.String(64), nullable=False),  # of the bytes that were sent
    sa.Column("bytes", sa.Integer, nullable=False),
    sa.Column("width", sa.Integer, nullable=False),
    sa.Column("height", sa.Integer, nullable=False),
    sa.Column("score", sa.Float, nullable=False),
    sa.Column("threshold", sa.Float, nullable=False),
    sa.Column("threshold_source", sa.String(16), nullable=False),
    sa.Column("p_value", sa.Float),
    sa.Column("decision", sa.String(16), nullable=False),
    sa.Column("decode_ms", sa.Float, nullable=False),
    sa.Column("queue_ms", sa.Float, nullable=False),
    sa.Column("infer_ms", sa.Float, nullable=False),
    sa.Column("render_ms", sa.Float, nullable=False),
    sa.Column("total_ms", sa.Float, nullable=False),
    sa.Column("archived", sa.Boolean, nullable=False),
    # Time needs none, as ids are in its order; what is left finds its rows on the way back in it.
    sa.Index("inspections_by_model", "model", "id"),
    sa.Index("inspections_by_request", "request_id"),
    sa.Index("inspections_by_image", "sha256"),
)

# The last row of an inspection counts; what was said before stays.
feedback = sa.Table(
    "feedback",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column(
        "inspection",
        _InspectionId,
        sa.ForeignKey("inspections.id", ondelete="CASCADE"),
        nullable=False,
    ),
    sa.Column("label", sa.String(16), nullable=False),
    sa.Column("note", sa.Text, nullable=False),
    sa.Column("by", sa.String(64), nullable=False),
    sa.Column("at", UtcTime, nullable=False),
    sa.Index("feedback_by_inspection", "inspection", "id"),
)

# The last row of a profile and calibration counts: an alarm stands until somebody resets it.
drift_events = sa.Table(
    "drift_events",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("at", UtcTime, nullable=False),
    sa.Column("by", sa.String(64), nullable=False),  # "": the test itself
    *_graph(),
    sa.Column("profile", sa.String(64), nullable=False),
    sa.Column("calibration", sa.String(32), nullable=False),  # "bundle": its own
    sa.Column("kind", sa.String(8), nullable=False),
    sa.Column("images", sa.Integer, nullable=False),
    sa.Column("statistic", sa.Float, nullable=False),
    sa.Index("drift_events_by_graph", "model", "version", "digest"),
)

# Which version of a model serves is its last row here; without one, the newest at start.
model_activations = sa.Table(
    "model_activations",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("at", UtcTime, nullable=False),
    sa.Column("by", sa.String(64), nullable=False),
    *_graph(),
    sa.Column("rolls_back", sa.Boolean, nullable=False),
    sa.Index("model_activations_by_model", "model"),
)

# The same for the version that is tried beside it; null: none any more.
model_shadows = sa.Table(
    "model_shadows",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("at", UtcTime, nullable=False),
    sa.Column("by", sa.String(64), nullable=False),
    sa.Column("model", sa.String(64), nullable=False),
    sa.Column("version", sa.Integer),
    sa.Column("digest", sa.String(64)),
    sa.Index("model_shadows_by_model", "model"),
)

shadow_counts = sa.Table(
    "shadow_counts",
    metadata,
    sa.Column("shadow", sa.Integer, sa.ForeignKey("model_shadows.id"), primary_key=True),
    sa.Column("outcome", sa.String(32), primary_key=True),
    sa.Column("images", sa.Integer, nullable=False),
    sa.Column("score_difference", sa.Float, nullable=False),  # summed over the images
    sa.Column("p_value_difference", sa.Float, nullable=False),
)

# A key that was revoked stays, since what it did names it.
keys = sa.Table(
    "keys",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("scope", sa.String(16), nullable=False),
    sa.Column("hash", sa.String(64), nullable=False, unique=True),  # SHA-256 of the token
    sa.Column("created", UtcTime, nullable=False),
    sa.Column("expires", UtcTime),
    sa.Column("revoked", UtcTime),
    sa.Column("max_rate", sa.Float),  # requests a second
)
sa.Index(
    "keys_in_force",
    keys.c.name,
    unique=True,
    sqlite_where=keys.c.revoked.is_(None),
    postgresql_where=keys.c.revoked.is_(None),
)


class Database:
    """An engine on a migrated database.

    Raises SettingsError where `url` is none, the database can't be opened, or a newer version of
    the service made it.
    """

    def __init__(self, url: str) -> None:
        parsed = _parsed(url)
        self.shown = parsed.render_as_string(hide_password=True)
        try:
            self._engine = _engine(parsed)
        except (OSError, ImportError) as error:
            raise SettingsError(f"database {self.shown}: {error}") from error
        try:
            self._migrate()
        except BaseException as error:
            self.close()
            if isinstance(error, DatabaseAway):
                reason = str(error)
            elif isinstance(error, sa.exc.SQLAlchemyError):
                reason = f"database {self.shown}: {error}"
            else:
                raise
            raise SettingsError(reason) from error

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A transaction that only reads; raises DatabaseAway."""
        with self._transaction(write=False) as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction that is committed whole or not at all; raises DatabaseAway."""
        with self._transaction(write=True) as connection:
            yield connection

    def insert_new(self, table: sa.Table) -> Any:
        """An insertion that leaves out rows whose keys are taken."""
        return _INSERTS[self._engine.dialect.name](table).on_conflict_do_nothing()

    def insert_rows(
        self, connection: sa.Connection, table: sa.Table, rows: Sequence[tuple[Any, ...]]
    ) -> None:
        """Inserts rows of all the table's columns, but for those whose keys are taken.

        What SQLAlchemy does for each row takes longer than what SQLite does.
        """
        dialect = connection.dialect
        compiled = self.insert_new(table).compile(dialect=dialect)
        convert = [column.type.dialect_impl(dialect).bind_processor(dialect) for column in table.c]
        columns = [
            [each(value) for value in values] if each else values
            for each, values in zip(convert, zip(*rows, strict=True), strict=True)
        ]
        tuples = list(zip(*columns, strict=True))
        names = table.c.keys()
        parameters = (
            tuples
            if compiled.positional
            else [dict(zip(names, row, strict=True)) for row in tuples]
        )
        connection.exec_driver_sql(str(compiled), parameters)

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _transaction(self, *, write: bool, busy_s: int | None = None) -> Iterator[sa.Connection]:
        """`busy_s`: how long SQLite waits for other writers, instead of `_BUSY_S`."""
        try:
            with self._engine.connect() as connection:
                connection.execution_options(skrd4ad_write=write, skrd4ad_busy_s=busy_s)
                with connection.begin():
                    yield connection
        except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError) as error:
            reason = str(getattr(error, "orig", error))
            raise DatabaseAway(f"database {self.shown}: {reason.strip()}") from error

    def _migrate(self) -> None:
        """Only reads where there is nothing to do: a service that starts waits for no writer."""
        with self.read() as connection:
            found = self._version(connection)
        if found == _NEWEST:
            return
        import_module("alembic.command")  # takes a while, and others will wait for the lock
        with self._transaction(write=True, busy_s=_MIGRATION_S) as connection:
            connection.detach()  # to be closed, not lent again: others don't wait as long
            if connection.dialect.name == "postgresql":  # as SQLite's writers, one after the other
                connection.execute(sa.text("SET LOCAL statement_timeout = 0"))
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            found = self._version(connection)  # which another may have migrated meanwhile
            if found == _NEWEST:
                return
            if not sa.inspect(connection).get_table_names():
                log.warning(
                    "new database %s: no calibrations yet, every model starts with its bundle's "
                    "own threshold",
                    self.shown,
                )
            _upgrade(connection)
        log.info("database %s: migrated from %s to %s", self.shown, found or "none", _NEWEST)

    def _version(self, connection: sa.Connection) -> str | None:
        """The last migration; raises SettingsError where only a newer service knows it."""
        if not sa.inspect(connection).has_table("alembic_version"):
            return None
        found: str | None = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
        if found is not None and found > _NEWEST:
            raise SettingsError(
                f"database {self.shown}: a newer version of the service made it ({found}; this one "
                f"knows {_NEWEST})"
            )
        return found


def lock(connection: sa.Connection, table: sa.Table) -> None:
    """Nobody else writes to the table before this transaction ends, which decides by what it has.
    A writer of SQLite is alone anyhow."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text(f"LOCK TABLE {table.name} IN SHARE ROW EXCLUSIVE MODE"))


def _upgrade(connection: sa.Connection) -> None:
    # A tenth of a service's start, which most of them needn't spend.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _parsed(url: str) -> sa.URL:
    try:
        parsed = make_url(url)
    except sa.exc.ArgumentError:
        raise SettingsError(
            "database_url is no SQLAlchemy URL (sqlite:///file.sqlite, postgresql://host/name)"
        ) from None
    if parsed.get_backend_name() not in _INSERTS:
        raise SettingsError(
            f"database {parsed.render_as_string(hide_password=True)}: "
            f"{parsed.get_backend_name()} is none of {', '.join(_INSERTS)}"
        )
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise SettingsError(
            "database sqlite:// is in memory, where nothing outlives the service: give a file, as "
            "sqlite:///state/skrd4ad.sqlite"
        )
    return parsed


def sqlite_file(url: str) -> Path | None:
    """The file of a SQLite database; None of another kind. Raises SettingsError as `Database`."""
    parsed = _parsed(url)
    return Path(str(parsed.database)) if parsed.get_backend_name() == "sqlite" else None


def _engine(url: sa.URL) -> sa.Engine:
    if url.get_backend_name() == "sqlite":
        Path(str(url.database)).parent.mkdir(parents=True, exist_ok=True)
        engine = sa.create_engine(url, connect_args={"timeout": _BUSY_S})
        sa.event.listen(engine, "connect", _configure_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
        return engine
    return sa.create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_pre_ping=True,  # a connection that the server closed meanwhile is replaced unseen
        pool_timeout=_AWAY_S,
        connect_args={
            "connect_timeout": _AWAY_S,
            # A server that fell silent is given up, not waited for as long as TCP would.
            "keepalives_idle": _AWAY_S,
            "keepalives_interval": _AWAY_S,
            "keepalives_count": 2,
            "tcp_user_timeout": 1000 * 3 * _AWAY_S,
            "options": f"-c statement_timeout={_STATEMENT_MS}",
        },
    )


def _configure_sqlite(connection: Any, record: Any) -> None:
    """Readers never wait for a writer, and a commit survives a crash."""
    connection.isolation_level = None  # else Python begins by itself, too late and not for tables
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")


def _begin_sqlite(connection: sa.Connection) -> None:
    options = connection.get_execution_options()
    if busy_s := options.get("skrd4ad_busy_s"):
        connection.exec_driver_sql(f"PRAGMA busy_timeout={1000 * busy_s}")
    write = options.get("skrd4ad_write", True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
