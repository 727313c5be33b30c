import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from sqlalchemy import text
from typer.testing import CliRunner

from orchestrator.db_cli import app
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
