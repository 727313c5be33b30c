"""A database of each schema that was ever shipped, as that version's own code wrote it, upgrades and goes on.

`shipped/REVISION.ENGINE.sql` holds a run with one committed round and one that was open, and, from the revision on that
brought them, an enrolled client and a privacy ledger. Who adds a migration adds the files of the schema before it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, make_url, text
from typer.testing import CliRunner

from contract.errors import SchemaError
from orchestrator.db_cli import app
from storage.artifacts import ArtifactStore
from storage.backup import read_manifest, restore
from storage.engine import make_engine
from storage.ledger import open_ledger
from storage.records import RoundCommit
from storage.revisions import _scripts, current_revision, damage, drift, head_revision, upgrade
from storage.store import open_store
from tests.storage.ledger_cases import Key, admit_all, charge, unit

SHIPPED = Path(__file__).parent / "shipped"
REVISIONS = ("0001", "0002", "0003", "0004", "0005")
RUN = "20261101-000000-0001"


@pytest.fixture(params=REVISIONS)
def revision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def old(database_url: str, revision: str) -> Iterator[Engine]:
    """A database of that revision."""
    url = make_url(database_url)
    sql = (SHIPPED / f"{revision}.{url.get_backend_name()}.sql").read_text(encoding="utf-8")
    if url.get_backend_name() == "sqlite":
        connection = sqlite3.connect(str(url.database))
        connection.executescript(sql)
        connection.close()
    else:
        made = create_engine(url.set(drivername="postgresql+psycopg"))
        with made.begin() as connection, connection.connection.cursor() as cursor:
            cursor.execute(sql)  # SQLAlchemy would take its per cent signs for places of values
        made.dispose()
    engine = make_engine(database_url)
    yield engine
    engine.dispose()


def test_every_schema_before_this_one_is_kept() -> None:
    earlier = {script.revision for script in _scripts().walk_revisions()} - {head_revision()}
    assert set(REVISIONS) == earlier
    names = {f"{revision}.{engine}.sql" for revision in earlier for engine in ("sqlite", "postgresql")}
    assert {path.name for path in SHIPPED.iterdir()} == names


def test_it_upgrades_and_its_run_goes_on(old: Engine, database_url: str, revision: str) -> None:
    assert current_revision(old) == revision
    with pytest.raises(SchemaError, match=rf"revision {revision}, this code needs .*: run `trunkline db upgrade`"):
        open_store(database_url)
    assert upgrade(old) == (revision, head_revision())
    assert (drift(old), damage(old)) == ([], [])

    store = open_store(database_url)
    run = store.get_run(RUN)
    assert (run.flower_run_id, run.status, run.committed_rounds, run.config["num-rounds"]) == ("4711", "running", 1, 3)
    assert [(row.number, row.status) for row in store.rounds(RUN)] == [(1, "committed"), (2, "open")]
    assert [(client.node_id, client.name) for client in store.clients()] == [("11", "north"), ("12", None)]
    assert {(row.name, row.value) for row in store.metrics(RUN)} == {("train_loss", 3.5), ("eval_loss", 3.25)}
    assert [event.detail for event in store.events(RUN)] == [{"rank": 8}]
    assert [one.client_id for one in store.list_identities()] == ([] if revision == "0001" else ["ward"])

    store.resume_run(RUN, "4712")
    attempt = store.open_round(RUN, 2, ["11", "12"])
    store.commit_round(RoundCommit(RUN, 2, attempt, "e" * 64, "f" * 64, 7, ["11", "12"], 1.0))
    assert [version.number for version in store.adapter_versions(RUN)] == [0, 1, 2]
    store.close()


def test_it_can_be_backed_up_before_it_is_upgraded(
    old: Engine, database_url: str, revision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TRUNKLINE_DATABASE_URL", database_url)
    with old.begin() as connection:  # its adapters were never files
        connection.execute(text("DELETE FROM adapter_versions"))
    done = CliRunner().invoke(app, ["backup", str(tmp_path / "backup")])
    assert done.exit_code == 0, done.output
    assert f"its schema is revision {revision}" in done.stderr
    manifest = read_manifest(tmp_path / "backup")
    assert manifest.revision == revision
    assert upgrade(old) == (revision, head_revision()), "the backup upgraded what it copied"
    if old.dialect.name == "sqlite":
        restored = make_engine(f"sqlite:///{tmp_path / 'restored.db'}")
        restore(str(restored.url), ArtifactStore(tmp_path / "other"), tmp_path / "backup")
        assert current_revision(restored) == revision
        restored.dispose()


def test_its_ledger_holds_and_is_appended_to(old: Engine, database_url: str, revision: str) -> None:
    upgrade(old)
    ledger = open_ledger(database_url, signer=Key())
    if revision >= "0004":
        states = [(row.round, row.state) for row in ledger.rows(unit()) if row.kind == "charge"]
        assert states == [(1, "RESERVED"), (1, "COMMITTED"), (2, "RESERVED")]
    assert ledger.reserve([charge(number=3)], admit_all) == []
    assert ledger.verify() == []
    ledger.close()
