"""URLs, disks and connections that cannot be used each give one clear error of our own."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, make_url, text
from sqlalchemy.orm import Session

from contract.errors import ConfigError, ConnectionFailedError, StorageError
from storage import engine as engine_module
from storage import revisions
from storage.engine import bound_statements, in_turn, make_engine, read_only, storage_errors
from storage.home import artifacts_dir, database_url, home_dir, network_filesystem
from storage.revisions import upgrade
from storage.store import open_store


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("no url at all", "TRUNKLINE_DATABASE_URL is no database URL"),
        ("mysql://u:hunter2@host/db", r"TRUNKLINE_DATABASE_URL is mysql://u:\*\*\*@host/db; it must be sqlite"),
        ("sqlite://", "it must name a file"),
        ("sqlite:///:memory:", "it must name a file"),
    ],
)
def test_an_impossible_url_is_refused_by_its_variable_and_without_its_password(url: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        make_engine(url)
    assert "hunter2" not in str(caught.value)


def test_a_database_server_that_does_not_answer_is_a_connection_error() -> None:
    with pytest.raises(
        ConnectionFailedError, match=r"no database answers at postgresql\+psycopg://u:\*\*\*@"
    ) as caught:
        open_store("postgresql://u:hunter2@127.0.0.1:1/db")
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=f"cannot make {tmp_path / 'file'}"):
        open_store(f"sqlite:///{tmp_path / 'file' / 'x.db'}")


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_text("this is no database, but text that is long enough to be read as a header" * 20)
    with pytest.raises(StorageError, match=r"x\.db: file is not a database"):
        open_store(f"sqlite:///{tmp_path / 'x.db'}")


def test_sqlite_runs_in_wal_with_foreign_keys_and_durable_commits(tmp_path: Path) -> None:
    engine = make_engine(f"sqlite:///{tmp_path / 'x.db'}")
    with engine.connect() as connection:
        pragmas = {
            name: connection.execute(text(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "foreign_keys", "synchronous", "busy_timeout")
        }
    assert pragmas == {
        "journal_mode": "wal",
        "foreign_keys": 1,
        "synchronous": 2,
        "busy_timeout": engine_module.BUSY_TIMEOUT_S * 1000,
    }
    engine.dispose()


def test_the_directory_is_made_for_its_owner_only(tmp_path: Path) -> None:
    open_store(f"sqlite:///{tmp_path / 'home' / 'x.db'}").close()
    assert (tmp_path / "home").stat().st_mode & 0o777 == 0o700


def test_home_follows_its_variable_and_the_database_lies_in_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = tmp_path / "a b%20c ?#"
    monkeypatch.setenv("TRUNKLINE_HOME", str(home))
    monkeypatch.delenv("TRUNKLINE_DATABASE_URL", raising=False)
    assert home_dir() == home
    assert artifacts_dir() == home / "artifacts"
    open_store().close()
    assert (home / "trunkline.db").is_file()
    monkeypatch.setenv("TRUNKLINE_DATABASE_URL", "postgresql://elsewhere/db")
    assert database_url() == "postgresql://elsewhere/db"


def test_home_is_a_hidden_directory_of_the_user_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRUNKLINE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home_dir() == tmp_path / ".trunkline"


def mount_table(tmp_path: Path) -> Path:
    table = tmp_path / "mounts"
    table.write_text(
        "/dev/sda1 / ext4 rw 0 0\nserver:/x /home nfs4 rw 0 0\n/dev/sdb1 /home/local ext4 rw 0 0\n"
        "//nas/y /mnt/my\\040disk cifs rw 0 0\n",
        encoding="utf-8",
    )
    return table


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/u/x.db", "nfs4"),
        ("/home/local/x.db", None),
        ("/var/x.db", None),
        ("/mnt/my disk/x.db", "cifs"),
        ("/homework/x.db", None),
    ],
)
def test_a_network_disk_is_told_by_the_closest_mount(tmp_path: Path, path: str, kind: str | None) -> None:
    assert network_filesystem(Path(path), mount_table(tmp_path)) == kind


def test_sqlite_on_a_network_disk_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine_module, "network_filesystem", lambda path: "nfs4")
    with caplog.at_level(logging.WARNING, "trunkline.storage"):
        make_engine(f"sqlite:///{tmp_path / 'x.db'}")
    assert "lies on a network disk (nfs4)" in caplog.text


def failing_work(engine: Engine, statement: str, times: int) -> tuple[list[int], Callable[[Session], int]]:
    """Work that adds a row and fails `times` times after it; answers its tries, too."""
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE IF NOT EXISTS tries (number INTEGER)"))
    tries: list[int] = []

    def work(session: Session) -> int:
        tries.append(1)
        session.execute(text("INSERT INTO tries VALUES (1)"))
        if len(tries) <= times:
            session.execute(text(statement))
        return len(tries)

    return tries, work


def rows_of_tries(engine: Engine) -> Any:
    with engine.begin() as connection:
        return connection.execute(text("SELECT count(*) FROM tries")).scalar()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_work_that_got_in_anothers_way_is_begun_again_from_nothing(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_MOST_TRIES", 4)
    engine = make_engine(database_url)
    for code in ("40001", "40P01"):
        fail = f"DO $$ BEGIN RAISE EXCEPTION 'in the way' USING ERRCODE = '{code}'; END $$"
        work = failing_work(engine, fail, 3)[1]
        before = rows_of_tries(engine)
        assert in_turn(engine, work) == 4
        tries, work = failing_work(engine, fail, 99)
        with pytest.raises(StorageError, match="in the way"):
            in_turn(engine, work)
        assert (len(tries), rows_of_tries(engine)) == (4, before + 1)
    engine.dispose()


def test_work_that_fails_otherwise_is_done_once(database_url: str) -> None:
    engine = make_engine(database_url)
    tries, work = failing_work(engine, "SELECT 1 FROM nowhere", 99)
    with pytest.raises(StorageError, match="nowhere"):
        in_turn(engine, work)
    assert (len(tries), rows_of_tries(engine)) == (1, 0)
    engine.dispose()


def test_work_in_turn_is_serializable(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(database_url)
    if engine.dialect.name == "postgresql":
        level = in_turn(engine, lambda session: session.execute(text("SHOW transaction_isolation")).scalar())
        assert level == "serializable"
    else:
        monkeypatch.setattr(engine_module, "BUSY_TIMEOUT_S", 0.1)
        other = make_engine(database_url)

        def work(session: Session) -> None:
            session.execute(text("SELECT 1"))
            with pytest.raises(StorageError, match="database is locked"):
                in_turn(other, lambda second: second.execute(text("SELECT 1")))

        in_turn(engine, work)
        other.dispose()
    engine.dispose()


def test_a_connection_to_postgresql_notices_a_server_that_fell_silent() -> None:
    told = parameters("postgresql://u@127.0.0.1:1/db")
    assert told["connect_timeout"] == 10
    assert (told["keepalives_idle"], told["keepalives_interval"], told["keepalives_count"]) == (10, 5, 3)
    assert told["tcp_user_timeout"] == 30_000, "in milliseconds"


def test_what_the_url_says_of_a_connection_stays() -> None:
    told = parameters("postgresql://u@127.0.0.1:1/db?connect_timeout=2&keepalives_idle=60&tcp_user_timeout=9000")
    assert (told["connect_timeout"], told["keepalives_idle"], told["tcp_user_timeout"]) == ("2", "60", "9000")
    assert told["keepalives_count"] == 3


def parameters(url: str) -> dict[str, Any]:
    """What the driver is told for a connection, which is not made."""
    engine, found = make_engine(url), dict[str, Any]()

    def refuse(dialect: object, record: object, arguments: object, told: dict[str, Any]) -> None:
        found.update(told)
        raise ConnectionRefusedError("no connection is made")

    event.listen(engine, "do_connect", refuse)
    with pytest.raises(ConnectionRefusedError):
        engine.connect()
    return found


def shows(connection: Connection, name: str) -> Any:
    return connection.execute(text(f"SHOW {name}")).scalar()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_the_driver_takes_all_that_it_is_told(database_url: str) -> None:
    engine = make_engine(database_url)
    with engine.connect() as connection:
        used = connection.connection.driver_connection.info.get_parameters()  # type: ignore[union-attr]
    assert {name: used[name] for name in engine_module._CONNECTION} == {
        name: str(value) for name, value in engine_module._CONNECTION.items()
    }
    engine.dispose()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_postgresql_bounds_every_statement_and_every_wait_for_a_lock(database_url: str) -> None:
    for engine, longest in ((make_engine(database_url), "10min"), (read_only(make_engine(database_url)), "30s")):
        with engine.connect() as connection:
            assert (shows(connection, "statement_timeout"), shows(connection, "lock_timeout")) == (longest, "30s")
        engine.dispose()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_the_limits_in_a_urls_options_stay(database_url: str) -> None:
    options = {"options": "-c statement_timeout=7s -c lock_timeout=3s"}
    url = make_url(database_url).update_query_dict(options).render_as_string(hide_password=False)
    for engine in (make_engine(url), read_only(make_engine(url))):
        with engine.begin() as connection:
            bound_statements(connection, 60)
            assert (shows(connection, "statement_timeout"), shows(connection, "lock_timeout")) == ("7s", "3s")
        engine.dispose()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_the_limits_that_an_administrator_gave_the_database_stay(database_url: str) -> None:
    engine = make_engine(database_url)
    with engine.begin() as connection:
        connection.execute(text(f"ALTER DATABASE \"{make_url(database_url).database}\" SET statement_timeout = '5s'"))
    engine.dispose()
    with engine.connect() as connection:
        assert (shows(connection, "statement_timeout"), shows(connection, "lock_timeout")) == ("5s", "30s")
    engine.dispose()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_statement_that_hangs_ends_with_an_error_of_ours(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "STATEMENT_TIMEOUT_S", 0.2)
    engine = make_engine(database_url)
    with pytest.raises(StorageError, match="canceling statement due to statement timeout"):
        in_turn(engine, lambda session: session.execute(text("SELECT pg_sleep(240)")))
    with storage_errors(engine), engine.connect() as connection:
        assert connection.execute(text("SELECT 1")).scalar() == 1, "the connection is as good as before"
    engine.dispose()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_limit_for_one_transaction_ends_with_it(database_url: str) -> None:
    engine = make_engine(database_url)
    with engine.connect() as connection:
        with connection.begin():
            bound_statements(connection, 0.0001)
            assert shows(connection, "statement_timeout") == "1ms", "nought would be no limit"
        assert shows(connection, "statement_timeout") == "10min"
    engine.dispose()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_an_upgrade_is_not_cut_off_where_other_statements_are(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, limits = make_engine(database_url), []

    def note(config: object, revision: str) -> None:
        limits.append(shows(config.attributes["connection"], "statement_timeout"))  # type: ignore[attr-defined]

    monkeypatch.setattr(revisions.command, "upgrade", note)
    upgrade(engine)
    assert limits == ["1h"]
    engine.dispose()
