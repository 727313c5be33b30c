"""Whether a database takes writes, and what its clock says; both engines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, text

from contract.errors import StorageError
from storage.engine import make_engine
from storage.health import clock_skew, try_write
from storage.revisions import upgrade
from storage.store import open_reader


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    made = make_engine(database_url)
    upgrade(made)
    yield made
    made.dispose()


def test_a_write_is_tried_and_leaves_nothing(engine: Engine, database_url: str) -> None:
    try_write(engine)
    reader = open_reader(database_url)
    assert reader.events() == []
    reader.close()


def test_a_database_that_takes_no_writes_says_why(engine: Engine) -> None:
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            name = engine.url.database
            connection.execute(text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
        else:
            connection.execute(
                text("CREATE TRIGGER shut BEFORE INSERT ON events BEGIN SELECT RAISE(ABORT, 'read-only'); END")
            )
    engine.dispose()
    with pytest.raises(StorageError, match="read-only"):
        try_write(engine)


def test_a_servers_clock_is_compared_and_a_file_has_none(engine: Engine) -> None:
    found = clock_skew(engine)
    if engine.dialect.name == "sqlite":
        assert found is None
        return
    assert found is not None
    skew_s, error_s = found
    assert error_s > 0
    assert abs(skew_s) <= error_s + 0.001, "the server is on this machine: it cannot be further off than that"
