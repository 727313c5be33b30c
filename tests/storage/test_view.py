"""A view reads runs and ledger, and the database itself refuses to be written through it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import text

from contract.errors import SchemaError, StorageError
from contract.privacy_records import Budget, Unit
from storage.engine import make_engine
from storage.revisions import VERSION_TABLE
from storage.store import Store, open_store
from storage.view import View

BUDGET = Budget(8.0, 1e-5, 4.0, {"holder": 1.0, "orchestrator": 1.0, "trunk": 1.0})


def test_what_is_in_the_database_is_read(database_url: str, store: Store) -> None:
    store.create_run("r1", "7", {}, "simulation", "f" * 64)
    with closing(View(database_url)) as view:
        view.require_current()
        assert view.reader.get_run("r1").flower_run_id == "7"
        assert view.reader.find_run("r2") is None
        assert view.ledger.budgets() == {}


def test_the_database_refuses_to_be_written(database_url: str, store: Store) -> None:
    store.create_run("r1", "7", {}, "simulation", "f" * 64)
    with closing(View(database_url)) as view:
        unit = Unit("north", "notes", "client")
        with pytest.raises(StorageError, match="read-?only"):
            view.ledger.set_budget(unit, BUDGET, "ada", "why not")
        with pytest.raises(StorageError, match="read-?only"), closing(Store(view.reader._engine)) as writer:
            writer.finish_run("r1", "stopped", "by who only looks")
    assert store.get_run("r1").status == "running"


def test_an_absent_database_is_told_of_and_not_made(tmp_path: Path) -> None:
    with closing(View(f"sqlite:///{tmp_path / 'runs.db'}")) as view:
        with pytest.raises(StorageError, match="there is no Trunkline database"):
            view.require_current()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("revision", "told"), [("0001", "run `trunkline db upgrade`"), ("9999", "newer than")])
def test_another_schema_is_told_of_and_stays(database_url: str, revision: str, told: str) -> None:
    open_store(database_url).close()
    engine = make_engine(database_url)
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = :of"), {"of": revision})
    with closing(View(database_url)) as view:
        with pytest.raises(SchemaError, match=told):
            view.require_current()
    with engine.begin() as connection:
        assert connection.scalar(text(f"SELECT version_num FROM {VERSION_TABLE}")) == revision
    engine.dispose()


def test_the_password_stays_out_of_what_is_shown() -> None:
    with closing(View("postgresql://ada:secret@db.example/runs")) as view:
        assert "secret" not in view.place
        assert "db.example" in view.place
