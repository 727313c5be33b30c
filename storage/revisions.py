"""The database's schema revision against this code's: create, upgrade, refuse. Alembic is configured here, in code."""

from __future__ import annotations

import logging
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, inspect, text

from contract.durable_file import PARTIAL_PREFIX, settle_file
from contract.errors import SchemaError, StorageError
from contract.failpoint import failpoint
from storage import audit_log, schema
from storage.engine import bound_statements, for_writing, make_engine, shown, storage_errors
from storage.home import database_url, names_database
from storage.records import Deed

# Not Alembic's default name: another program's tables may live in the same PostgreSQL database.
VERSION_TABLE = "trunkline_schema"
_MIGRATIONS = Path(__file__).parent / "migrations"
_ADVISORY_LOCK = 0x7472756E6B
_UPGRADE_LIMIT_S = 3600.0
"""For each statement of an upgrade: one may write a large table anew."""

SchemaState = Literal["absent", "older", "current", "newer"]

_log = logging.getLogger("trunkline.storage")


def opened_for_writing(url: str | None) -> Engine:
    """The database at `url` (default: TRUNKLINE_DATABASE_URL, else SQLite in the home directory) with this schema.

    An empty database gets the schema; the home directory's own file, where no URL names another, follows this code's
    after a copy of it was kept. Raises SchemaError on a schema older or newer than this code's, ConfigError on a
    URL that is none, StorageError or ConnectionFailedError where the database cannot be opened.
    """
    engine = make_engine(url or database_url())
    with storage_errors(engine):
        copy = follow(engine) if url is None and not names_database() else None
        prepare(engine)
    if copy is not None:
        _log.warning("the database is of this version's schema now; as it was before it is kept in %s", copy)
    return engine


def head_revision() -> str:
    """The newest revision that this code knows."""
    return str(_scripts().get_current_head())


def current_revision(engine: Engine) -> str | None:
    """The database's revision, or None where it has no schema of ours; a file that is absent stays absent.

    Raises SchemaError on tables of our names that no revision accounts for.
    """
    if _is_absent(engine):
        return None
    with engine.connect() as connection:
        return _revision(connection)


def state(found: str | None) -> SchemaState:
    """How the revision of a database stands to this code's."""
    if found is None:
        return "absent"
    if found == head_revision():
        return "current"
    return "older" if found in {script.revision for script in _scripts().walk_revisions()} else "newer"


def prepare(engine: Engine) -> None:
    """Give an empty database the schema, and require this code's revision of any other."""
    if current_revision(engine) is None:
        upgrade(engine)
    require_current(engine)


def require_current(engine: Engine) -> None:
    """Raise SchemaError unless the database's schema is this code's, StorageError where there is none yet."""
    found = current_revision(engine)
    if found is None:
        raise StorageError(f"there is no Trunkline database at {shown(engine)} yet; the first run makes it")
    _refuse_newer(engine, found)
    if state(found) == "older":
        raise SchemaError(
            f"the schema of {shown(engine)} is revision {found}, this code needs {head_revision()}: "
            "run `trunkline db upgrade`"
        )


def follow(engine: Engine) -> Path | None:
    """Upgrade an older SQLite database, a copy kept beside it; answers the copy, or None where nothing was older.

    For the file that this machine's own runs make unasked: its user never chose to have a schema to look after.
    """
    found = current_revision(engine)
    if state(found) != "older":
        return None
    copy = Path(f"{engine.url.database}.revision-{found}")
    if not copy.exists():  # another process may be as far
        _copy(engine, copy)
    upgrade(engine)
    return copy


def _copy(engine: Engine, copy: Path) -> None:
    """Keep the database as it is in `copy`: all of it or nothing, as a later start takes what is there for whole."""
    partial = copy.with_name(f"{PARTIAL_PREFIX}{secrets.token_hex(8)}")
    with engine.connect() as connection:
        connection.exec_driver_sql("COMMIT")  # VACUUM runs outside of transactions only
        connection.exec_driver_sql("VACUUM INTO ?", (str(partial),))
    try:
        settle_file(partial, copy)
    except OSError as error:
        raise StorageError(f"{copy}: the database cannot be copied before its upgrade: {error.strerror}") from error


def upgrade(engine: Engine, operator: str | None = None) -> tuple[str | None, str]:
    """Bring the database to this code's revision in one transaction; answers (revision before, after).

    Where that changes anything and an `operator` asked for it, the audit log says so.
    """
    failpoint("sql.upgrade.before")
    with for_writing(engine).begin() as connection:
        bound_statements(connection, _UPGRADE_LIMIT_S)
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        found = _revision(connection)  # again under the lock: another process may have been first
        if found is not None:
            _refuse_newer(engine, found)
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        if operator is not None and found != head_revision():
            told = {"before": found, "revision": head_revision()}
            audit_log.note(connection, Deed(operator, "database-upgraded", shown(engine), told), datetime.now(UTC))
        failpoint("sql.upgrade.uncommitted")
    failpoint("sql.upgrade.after")
    return found, head_revision()


def drift(engine: Engine) -> list[str]:
    """Where the database's tables differ from what this code's schema says, a line each."""
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={"include_name": _is_ours, "compare_type": True, "version_table": VERSION_TABLE},
        )
        return [str(difference) for difference in compare_metadata(context, schema.Base.metadata)]


def damage(engine: Engine) -> list[str]:
    """What SQLite finds wrong with its own file, a line each; PostgreSQL checks its pages as it reads them."""
    if engine.dialect.name != "sqlite":
        return []
    with engine.connect() as connection:
        found = [str(row[0]) for row in connection.execute(text("PRAGMA integrity_check")) if row[0] != "ok"]
        broken = connection.execute(text("PRAGMA foreign_key_check")).all()
        return found + [f"table {row[0]}, row {row[1]} refers to a row of {row[2]} that is not there" for row in broken]


def _revision(connection: Connection) -> str | None:
    # Tables first: whoever makes them commits the revision with them, so a revision read later accounts for them.
    ours = sorted(set(inspect(connection).get_table_names()) & set(schema.Base.metadata.tables))
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    found = context.get_current_revision()
    if found is None and ours:
        raise SchemaError(
            f"the database at {shown(connection.engine)} holds tables named {', '.join(ours)} that Trunkline did not "
            "make: give it a database of its own"
        )
    return found


def _refuse_newer(engine: Engine, found: str) -> None:
    if state(found) == "newer":
        raise SchemaError(
            f"the schema of {shown(engine)} is revision {found}, newer than this code's {head_revision()}: "
            "use the Trunkline that wrote it, or a later one"
        )


def _is_absent(engine: Engine) -> bool:
    return engine.dialect.name == "sqlite" and not Path(engine.url.database or "").exists()


def _is_ours(name: str | None, kind: str, parents: object) -> bool:
    return kind != "table" or name in schema.Base.metadata.tables


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())
