"""A backup taken while a run goes on is restored to the same database and adapters, and nothing is written over."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from sqlalchemy import create_engine, make_url, text
from typer.testing import CliRunner

from orchestrator.db_cli import app
from storage import backup
from storage.artifacts import ArtifactStore
from storage.records import RoundCommit
from storage.store import Store, open_reader, open_store


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database_url: str) -> Path:
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TRUNKLINE_DATABASE_URL", database_url)
    return tmp_path / "home"


@pytest.fixture
def store(home: Path, database_url: str) -> Iterator[Store]:
    """A store with a run of one committed round, and another round open."""
    artifacts, opened = ArtifactStore(home / "artifacts"), open_store(database_url)
    opened.create_run("r1", "7", {"num-rounds": 3}, "simulation", "f")
    opened.add_adapter_version("r1", 0, artifacts.put(b"client 0"), artifacts.put(b"trunk 0"))
    opened.open_round("r1", 1, ["1", "2"])
    halves = (artifacts.put(b"client 1"), artifacts.put(b"trunk 1"))
    opened.commit_round(RoundCommit("r1", 1, 1, *halves, 10, ["1", "2"], 1.0))
    opened.open_round("r1", 2, ["1", "2"])
    artifacts.put(b"an orphan")
    yield opened
    opened.close()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database_url: str) -> Iterator[str]:
    """The URL of a database that is not there, or is empty, on the same engine."""
    url = make_url(database_url)
    if url.get_backend_name() == "sqlite":
        yield f"sqlite:///{tmp_path / 'elsewhere.db'}"
        return
    name = f"test_{secrets.token_hex(6)}"
    admin = create_engine(url.set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield url.set(database=name).render_as_string(hide_password=False)
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


def db(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments), "-o", "json"])


def contents(url: str) -> list[object]:
    reader = open_reader(url)
    try:
        return [reader.get_run("r1"), reader.rounds("r1"), reader.adapter_versions("r1"), reader.participations("r1")]
    finally:
        reader.close()


def test_a_backup_is_restored_to_what_it_was_taken_of(
    store: Store, database_url: str, elsewhere: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = db("backup", tmp_path / "backup")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["data"]["adapters"] == 4
    before = contents(database_url)
    store.finish_run("r1", "failed", "after the backup")
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path / "new home"))
    monkeypatch.setenv("TRUNKLINE_DATABASE_URL", elsewhere)
    done = db("restore", tmp_path / "backup", "--yes")
    assert done.exit_code == 0, done.output
    assert contents(elsewhere) == before
    assert db("check").exit_code == 0
    restored = ArtifactStore(tmp_path / "new home" / "artifacts")
    assert [restored.get(version.client_sha256) for version in store.adapter_versions("r1")] == [
        b"client 0",
        b"client 1",
    ]
    assert len(list((tmp_path / "new home" / "artifacts").iterdir())) == 4


def test_a_database_that_holds_anything_is_not_restored_into(store: Store, database_url: str, tmp_path: Path) -> None:
    assert db("backup", tmp_path / "backup").exit_code == 0
    before = contents(database_url)
    done = db("restore", tmp_path / "backup")
    assert done.exit_code == 1
    assert "already" in done.stderr
    assert contents(database_url) == before


@pytest.mark.parametrize("what", ["database", "artifact"])
def test_a_backup_that_was_changed_is_refused_before_anything_is_restored(
    store: Store, elsewhere: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    assert db("backup", tmp_path / "backup").exit_code == 0
    pattern = "database.*" if what == "database" else "artifacts/*"
    path = next(iter(sorted((tmp_path / "backup").glob(pattern))))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path / "new home"))
    monkeypatch.setenv("TRUNKLINE_DATABASE_URL", elsewhere)
    done = db("restore", tmp_path / "backup")
    assert done.exit_code == 1
    assert f"{path} is not what was backed up" in done.stderr
    assert not (tmp_path / "new home" / "artifacts").exists()


def test_an_adapter_that_is_gone_spoils_the_backup_by_its_name(store: Store, home: Path, tmp_path: Path) -> None:
    sha256 = store.adapter_version("r1", 1).trunk_sha256
    ArtifactStore(home / "artifacts").path(sha256).unlink()
    done = db("backup", tmp_path / "backup")
    assert done.exit_code == 1
    assert f"there is no artifact {sha256}" in done.stderr
    assert db("restore", tmp_path / "backup").exit_code == 2, "it has no manifest"


def test_a_directory_that_holds_something_is_not_taken_for_a_backup(store: Store, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    for command in ("backup", "restore"):
        assert db(command, tmp_path / "notes").exit_code == 2
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["mine.txt"]


def test_a_backup_that_is_newer_than_this_code_is_refused(
    store: Store, elsewhere: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert db("backup", tmp_path / "backup").exit_code == 0
    manifest = tmp_path / "backup" / backup.MANIFEST
    manifest.write_text(manifest.read_text().replace(backup.head_revision(), "9999"))
    monkeypatch.setenv("TRUNKLINE_DATABASE_URL", elsewhere)
    done = db("restore", tmp_path / "backup")
    assert done.exit_code == 1
    assert "schema revision 9999, newer than this code's" in done.stderr


Programs = list[tuple[list[str], dict[str, str]]]


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Programs:
    """Each of PostgreSQL's programs that would be run, with its environment."""
    seen: Programs = []

    class Done:
        returncode = 0

    def run(command: list[str], *, env: dict[str, str], **_: object) -> Done:
        seen.append((command, env))
        return Done()

    monkeypatch.setattr(backup.shutil, "which", lambda name: name)
    monkeypatch.setattr(backup.subprocess, "run", run)
    return seen


def test_the_password_is_in_no_argument(programs: Programs) -> None:
    backup._run(["pg_dump", "--file", "x"], make_url("postgresql://ada:secret@host:5433/runs"))
    ((command, env),) = programs
    assert "secret" not in " ".join(command)
    assert (env["PGPASSWORD"], env["PGHOST"], env["PGPORT"], env["PGUSER"]) == ("secret", "host", "5433", "ada")


def test_a_password_file_and_tls_of_the_url_hold_for_postgresqls_programs_too(programs: Programs) -> None:
    url = "postgresql://ada@host/runs?passfile=/keys/pgpass&sslmode=verify-full&sslrootcert=/keys/ca.pem"
    backup._run(["pg_dump", "--file", "x"], make_url(url))
    ((_, env),) = programs
    told = (env["PGPASSFILE"], env["PGSSLMODE"], env["PGSSLROOTCERT"])
    assert told == ("/keys/pgpass", "verify-full", "/keys/ca.pem")
    assert "PGPASSWORD" not in env
