import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from sqlalchemy import text
from typer.testing import CliRunner

from contract.errors import StorageError
from orchestrator.db_cli import app
from storage import audit_log
from storage.engine import make_engine
from storage.revisions import VERSION_TABLE, head_revision
from storage.store import open_store


@pytest.fixture
def named_url(database_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty database, named as a person names theirs."""
    monkeypatch.setenv("TRUNKLINE_DATABASE_URL", database_url)
    return database_url


def trunkline_db(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def data_of(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    envelope = json.loads(result.stdout)
    assert envelope["status"] == "ok"
    return envelope["data"]


def execute(database_url: str, statement: str) -> None:
    engine = make_engine(database_url)
    with engine.begin() as connection:
        connection.execute(text(statement))
    engine.dispose()


def test_upgrade_makes_the_database_and_then_finds_it_current(named_url: str) -> None:
    assert data_of(trunkline_db("upgrade", "-o", "json"))["before"] is None
    again = trunkline_db("upgrade", "-o", "json")
    assert data_of(again)["before"] == data_of(again)["revision"] == head_revision()
    assert "already current" in again.stderr
    open_store(named_url).close()


def test_current_tells_each_state(named_url: str) -> None:
    assert data_of(trunkline_db("current", "-o", "json"))["state"] == "absent"
    open_store(named_url).close()
    assert data_of(trunkline_db("current", "-o", "json"))["state"] == "current"
    execute(named_url, f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    found = data_of(trunkline_db("current", "-o", "json"))
    assert (found["revision"], found["newest"], found["state"]) == ("9999", head_revision(), "newer")


def test_check_passes_on_a_sound_database(named_url: str) -> None:
    open_store(named_url).close()
    assert data_of(trunkline_db("check", "-o", "json"))["sound"] is True


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        (f"UPDATE {VERSION_TABLE} SET version_num = '9999'", "revision 9999, newer than this code's"),
        ("ALTER TABLE clients DROP COLUMN name", "is not sound"),
    ],
)
def test_check_fails_with_exit_code_1_and_the_reason(named_url: str, statement: str, named: str) -> None:
    open_store(named_url).close()
    execute(named_url, statement)
    result = trunkline_db("check")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert named in result.stderr
    assert result.stdout == ""


def test_check_of_no_database_fails_and_makes_none(named_url: str, tmp_path: Path) -> None:
    result = trunkline_db("check")
    assert result.exit_code == 1
    assert f"there is no Trunkline database at {named_url[:6]}" in result.stderr
    assert not list(tmp_path.glob("*.db"))


@pytest.mark.parametrize(
    ("url", "exit_code"),
    [("mysql://h/db", 2), ("postgresql://u:hunter2@127.0.0.1:1/db", 3), ("sqlite:////proc/x.db", 1)],
)
def test_a_database_that_cannot_be_used_has_the_right_exit_code(
    monkeypatch: pytest.MonkeyPatch, url: str, exit_code: int
) -> None:
    monkeypatch.setenv("TRUNKLINE_DATABASE_URL", url)
    result = trunkline_db("upgrade")
    assert result.exit_code == exit_code
    assert len(result.stderr.strip().splitlines()) == 1
    assert "hunter2" not in result.output


# ---- the audit log ---------------------------------------------------------------------------------------------------


def test_the_log_shows_what_the_commands_did_newest_first(
    named_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path / "home"))
    assert (
        trunkline_db("upgrade", "--dry-run", "-o", "json").stderr.strip()
        == f"would be upgraded from nothing to {head_revision()}"
    )
    assert data_of(trunkline_db("current", "-o", "json"))["state"] == "absent", "a dry run made the database"
    assert trunkline_db("upgrade", "--operator", "ada").exit_code == 0
    assert trunkline_db("backup", str(tmp_path / "backup"), "--operator", "bob").exit_code == 0
    rows = data_of(trunkline_db("log", "-o", "json"))
    assert [(row["operator"], row["action"]) for row in rows] == [
        ("bob", "database-backed-up"),
        ("ada", "database-upgraded"),
    ]
    assert rows[0]["target"] == str(tmp_path / "backup")
    assert rows[0]["detail"] == {"revision": head_revision(), "adapters": 0}
    assert data_of(trunkline_db("log", "--operator", "ada", "-o", "json")) == rows[1:]
    assert data_of(trunkline_db("log", "--action", "database-backed-up", "-o", "json")) == rows[:1]
    assert data_of(trunkline_db("log", "--limit", "1", "-o", "json")) == rows[:1]
    assert data_of(trunkline_db("log", "--since", "2999-01-01", "-o", "json")) == []
    assert len(trunkline_db("log", "-o", "jsonl").stdout.splitlines()) == 2
    assert "database-backed-up" in trunkline_db("log").stdout


def test_a_backup_that_failed_is_in_no_log(named_url: str, tmp_path: Path) -> None:
    open_store(named_url).close()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert trunkline_db("backup", str(tmp_path / "full")).exit_code == 2
    assert data_of(trunkline_db("log", "-o", "json")) == []


def test_a_backup_that_the_log_cannot_take_is_told_as_done(
    named_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store(named_url).close()

    def full(*_: object) -> None:
        raise StorageError("no space left")

    monkeypatch.setattr(audit_log, "note", full)
    done = trunkline_db("backup", str(tmp_path / "backup"))
    assert done.exit_code == 1
    assert "the backup is written, but the audit log does not say so" in done.stderr
    assert "error: no space left" in done.stderr
    assert (tmp_path / "backup" / "manifest.json").exists()


def test_a_restored_database_says_who_restored_it(
    named_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not named_url.startswith("sqlite"):
        pytest.skip("tests/storage/test_backup.py restores on PostgreSQL too")
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path / "home"))
    open_store(named_url).close()
    assert trunkline_db("backup", str(tmp_path / "backup"), "--operator", "ada").exit_code == 0
    monkeypatch.setenv("TRUNKLINE_DATABASE_URL", f"sqlite:///{tmp_path / 'new.db'}")
    assert trunkline_db("restore", str(tmp_path / "backup"), "--yes", "--operator", "bob").exit_code == 0
    (entry,) = data_of(trunkline_db("log", "-o", "json"))
    assert (entry["operator"], entry["action"]) == ("bob", "database-restored"), (
        "the backup is older than its own entry"
    )


def test_a_log_of_no_database_is_told_and_makes_none(named_url: str, tmp_path: Path) -> None:
    done = trunkline_db("log")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "there is no Trunkline database" in done.stderr
