"""A database engine from a URL: SQLite in WAL mode or PostgreSQL, with every wait bounded and errors of our own."""

from __future__ import annotations

import json
import logging
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, overload

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session

from contract.errors import ConfigError, ConnectionFailedError, StorageError
from contract.failpoint import failpoint
from storage.home import DATABASE_VARIABLE, network_filesystem

BUSY_TIMEOUT_S = 30
STATEMENT_TIMEOUT_S = 600
"""The longest that PostgreSQL works on one of our statements; all but an upgrade's take seconds."""
# A server that lost its power sends nothing, not even an end: within half a minute the kernel gives it up for us.
_SILENCE = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 30_000}
_CONNECTION = {"connect_timeout": 10, **_SILENCE}
# What came with the connection is the user's own (`options` in the URL, or PGOPTIONS), what a role or a database has is
# its administrator's.
_BOUND = (
    "SELECT set_config(name, %s, %s) FROM pg_settings WHERE name = %s "
    "AND source NOT IN ('client', 'user', 'database', 'database user')"
)
_WRITES = "trunkline_writes"
_MOST_TRIES = 20
_LONGEST_PAUSE_S = 0.25
_IN_EACH_OTHERS_WAY = frozenset({"40001", "40P01"})  # PostgreSQL's serialization_failure and deadlock_detected
_Result = TypeVar("_Result")

_log = logging.getLogger("trunkline.storage")


def make_engine(url: str) -> Engine:
    """An engine for `sqlite:///PATH` or `postgresql://...`; the file's directory is made, the file is not yet.

    Limits of PostgreSQL's that the URL's query sets, on the connection or in its `options`, stay as it sets them.

    Raises ConfigError for another kind of URL or an absent driver, StorageError where the directory cannot be made.
    """
    parsed = _parse(url)
    if parsed.get_backend_name() == "sqlite":
        return _sqlite_engine(parsed)
    try:
        engine = create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            json_serializer=_finite_json,
            pool_pre_ping=True,
            pool_timeout=BUSY_TIMEOUT_S,
            connect_args={name: value for name, value in _CONNECTION.items() if name not in parsed.query},
        )
    except ModuleNotFoundError as error:
        raise ConfigError("PostgreSQL needs its driver: pip install 'trunkline[postgres]'") from error
    event.listen(engine, "connect", _bound_postgres)
    return engine


@contextmanager
def opened_engine(url: str) -> Iterator[Engine]:
    """An engine as make_engine gives it for as long as the block runs, whose errors become ours."""
    engine = make_engine(url)
    try:
        with storage_errors(engine):
            yield engine
    finally:
        engine.dispose()


def for_writing(engine: Engine) -> Engine:
    """The same engine, whose transactions take SQLite's write lock at their start: a reader that turns writer in the
    middle would fail at once instead of waiting its turn."""
    return engine.execution_options(**{_WRITES: True})


def read_only(engine: Engine) -> Engine:
    """The same engine, on whose connections the database refuses to write, and lets no statement take for ever."""
    event.listen(engine, "connect", _refuse_writes)
    return engine


def bound_statements(connection: Connection, limit_s: float) -> None:
    """Let PostgreSQL work on no further statement of this transaction for longer; SQLite bounds its waits alone."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(_BOUND, (_milliseconds(limit_s), True, "statement_timeout"))


def in_turn(engine: Engine, work: Callable[[Session], _Result]) -> _Result:
    """What `work` answers, done in one serializable transaction: as if nobody else wrote at the same time.

    SQLite takes its write lock first and waits. PostgreSQL lets writers run and refuses one whose transaction got in
    another's way: `work` is then begun again from nothing, after a pause, so it must change nothing but the session.
    Raises StorageError where that does not help after _MOST_TRIES tries.
    """
    writer = for_writing(engine)
    if engine.dialect.name == "postgresql":
        writer = writer.execution_options(isolation_level="SERIALIZABLE")
    tried = 0
    with storage_errors(engine):
        while True:
            try:
                failpoint("ledger.before")
                with Session(writer) as session, session.begin():
                    done = work(session)
                    session.flush()
                    failpoint("ledger.uncommitted")
                failpoint("ledger.after")
                return done
            except DBAPIError as error:
                tried += 1
                if tried == _MOST_TRIES or getattr(error.orig, "sqlstate", None) not in _IN_EACH_OTHERS_WAY:
                    raise
            time.sleep(random.uniform(0.0, min(_LONGEST_PAUSE_S, 0.002 * 2**tried)))


@overload
def storable(text: str) -> str: ...
@overload
def storable(text: None) -> None: ...
@overload
def storable(text: str | None) -> str | None: ...
def storable(text: str | None) -> str | None:
    """`text` without what a database refuses: a client's reason must not be able to spoil a commit."""
    return None if text is None else text.replace("\x00", "").encode("utf-8", "backslashreplace").decode()


def shown(engine: Engine) -> str:
    """The database's URL without its password."""
    return engine.url.render_as_string(hide_password=True)


@contextmanager
def storage_errors(engine: Engine) -> Iterator[None]:
    """Turn the database's errors into ours, on one line that names the database and never its password."""
    try:
        yield
    except SQLAlchemyError as error:
        reason = _one_line(error.orig if isinstance(error, DBAPIError) and error.orig else error)
        unreachable = isinstance(error, DBAPIError) and error.statement is None
        if unreachable and engine.dialect.name == "postgresql":
            raise ConnectionFailedError(f"no database answers at {shown(engine)}: {reason}") from error
        raise StorageError(f"database {shown(engine)}: {reason}") from error
    except (OverflowError, UnicodeError) as error:  # raised bare by the drivers on values they cannot store
        raise StorageError(f"database {shown(engine)}: {_one_line(error)}") from error


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigError(
            f"{DATABASE_VARIABLE} is no database URL; it must be sqlite:///PATH or postgresql://..."
        ) from error
    named = parsed.render_as_string(hide_password=True)
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise ConfigError(f"{DATABASE_VARIABLE} is {named}; it must be sqlite:///PATH or postgresql://...")
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigError(f"{DATABASE_VARIABLE} is {named}; it must name a file, as in sqlite:///PATH")
    return parsed


def _sqlite_engine(url: URL) -> Engine:
    path = Path(url.database or "").absolute()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {path.parent} for the database: {error.strerror}") from error
    filesystem = network_filesystem(path)
    if filesystem is not None:
        _log.warning(
            "%s lies on a network disk (%s), where SQLite's locks are not reliable: use a local disk", path, filesystem
        )
    engine = create_engine(
        url.set(database=str(path)),
        json_serializer=_finite_json,
        pool_timeout=BUSY_TIMEOUT_S,
        connect_args={"timeout": BUSY_TIMEOUT_S},
    )
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, record: Any) -> None:
    connection.isolation_level = None  # transactions begin where _begin_sqlite says
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")
    _switch_to_wal(connection)


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    """WAL lets readers read while one writes. The mode stays with the file; SQLite does not wait for it by itself."""
    give_up = time.monotonic() + BUSY_TIMEOUT_S
    while connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > give_up:
                raise
            time.sleep(0.05)


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _bound_postgres(connection: Any, record: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute(_BOUND, (_milliseconds(BUSY_TIMEOUT_S), False, "lock_timeout"))
        cursor.execute(_BOUND, (_milliseconds(STATEMENT_TIMEOUT_S), False, "statement_timeout"))
    connection.commit()


def _refuse_writes(connection: Any, record: Any) -> None:
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA query_only = ON")
        return
    with connection.cursor() as cursor:
        cursor.execute("SET default_transaction_read_only = on")
        cursor.execute(_BOUND, (_milliseconds(BUSY_TIMEOUT_S), False, "statement_timeout"))
    connection.commit()


def _milliseconds(limit_s: float) -> str:
    return f"{max(1, round(limit_s * 1000))}ms"  # 0 would be no limit


def _finite_json(value: object) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StorageError(f"a value cannot be kept as JSON: {error}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
