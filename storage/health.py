"""Whether a database can be worked with: a write that is taken back again, and how its clock stands to this machine's.

Both wait for no longer than storage.engine lets anybody wait for a database.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime

from sqlalchemy import Engine, func, insert, select

from storage import schema
from storage.engine import for_writing, storage_errors


def try_write(engine: Engine) -> None:
    """Write an event and take it back. Raises StorageError, with the database's reason, where that may not be done."""
    row = {"kind": "write-tried", "message": "taken back", "detail": {}, "at": datetime.now(UTC)}
    with storage_errors(engine), for_writing(engine).connect() as connection:
        connection.execute(insert(schema.Base.metadata.tables["events"]), row)
        connection.rollback()


def clock_skew(engine: Engine) -> tuple[float, float] | None:
    """Seconds that the database's clock is ahead of this machine's, and half of the round trip: how wrong that may be.

    None for SQLite, which has no clock of its own.
    """
    if engine.dialect.name == "sqlite":
        return None
    with storage_errors(engine), engine.connect() as connection:
        connection.execute(select(1))  # what connecting takes is no part of the round trip
        asked = time.time()
        told: datetime = connection.execute(select(func.clock_timestamp())).scalar_one()
        answered = time.time()
    return told.timestamp() - (asked + answered) / 2, (answered - asked) / 2
