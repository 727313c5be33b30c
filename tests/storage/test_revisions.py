"""The schema's life: created, current, older, newer, drifted, and not ours at all."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import Engine, inspect, text

from contract.errors import SchemaError, StorageError
from storage import revisions
from storage.engine import for_writing, make_engine
from storage.revisions import current_revision, damage, drift, head_revision, prepare, upgrade
from storage.store import open_reader, open_store

ROOT = Path(__file__).parents[2]


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    made = make_engine(database_url)
    yield made
    made.dispose()


def pretend_revision(engine: Engine, revision: str) -> None:
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE {revisions.VERSION_TABLE} SET version_num = '{revision}'"))


def test_an_empty_database_gets_the_schema_and_migrations_agree_with_the_models(engine: Engine) -> None:
    assert current_revision(engine) is None
    assert upgrade(engine) == (None, head_revision())
    assert current_revision(engine) == head_revision()
    assert drift(engine) == []
    assert damage(engine) == []


def test_upgrading_again_changes_nothing(engine: Engine) -> None:
    upgrade(engine)
    assert upgrade(engine) == (head_revision(), head_revision())


def test_drift_names_a_table_and_a_column_that_are_gone(engine: Engine) -> None:
    upgrade(engine)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE clients DROP COLUMN name"))
        connection.execute(text("DROP TABLE events"))
    found = " ".join(drift(engine))
    assert "'name'" in found
    assert "'events'" in found


def test_a_newer_schema_is_refused_with_both_revisions_and_left_alone(engine: Engine, database_url: str) -> None:
    upgrade(engine)
    pretend_revision(engine, "9999")
    for opening in (open_store, open_reader):
        with pytest.raises(SchemaError, match=rf"revision 9999, newer than this code's {head_revision()}"):
            opening(database_url)
    with pytest.raises(SchemaError, match="9999"):
        upgrade(engine)
    assert current_revision(engine) == "9999"


def test_an_older_schema_is_not_upgraded_in_passing(
    engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    open_store(database_url).close()
    migrations = tmp_path / "with a space % and a percent" / "migrations"
    shutil.copytree(ROOT / "storage" / "migrations", migrations, ignore=shutil.ignore_patterns("__pycache__"))
    (migrations / "versions" / "v9000_later.py").write_text(
        "import sqlalchemy as sa\nfrom alembic import op\n"
        f"revision = '9000'\ndown_revision = '{head_revision()}'\n"
        "def upgrade():\n    op.create_table('later', sa.Column('x', sa.Integer()))\n",
        encoding="utf-8",
    )
    first = head_revision()
    monkeypatch.setattr(revisions, "_MIGRATIONS", migrations)
    for opening in (open_store, open_reader):
        with pytest.raises(SchemaError, match=rf"revision {first}, this code needs 9000: run `trunkline db upgrade`"):
            opening(database_url)
    assert current_revision(engine) == first
    assert upgrade(engine) == (first, "9000")
    assert "later" in inspect(engine).get_table_names()


def test_an_upgrade_that_fails_leaves_the_schema_as_it_was(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    upgrade(engine)
    migrations = tmp_path / "migrations"
    shutil.copytree(ROOT / "storage" / "migrations", migrations, ignore=shutil.ignore_patterns("__pycache__"))
    (migrations / "versions" / "v9000_broken.py").write_text(
        f"from alembic import op\nrevision = '9000'\ndown_revision = '{head_revision()}'\n"
        "def upgrade():\n    op.drop_table('events')\n    op.execute('SELECT * FROM nowhere')\n",
        encoding="utf-8",
    )
    first = head_revision()
    monkeypatch.setattr(revisions, "_MIGRATIONS", migrations)
    with pytest.raises(Exception, match="nowhere"):
        upgrade(engine)
    assert current_revision(engine) == first
    assert "events" in inspect(engine).get_table_names()


def test_a_database_of_another_program_is_refused_if_its_tables_clash(engine: Engine, database_url: str) -> None:
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE runs (x INTEGER)"))
    with pytest.raises(SchemaError, match="holds tables named runs that Trunkline did not make"):
        open_store(database_url)
    assert inspect(engine).get_table_names() == ["runs"]


def test_tables_of_another_program_are_left_alone_otherwise(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32))"))
        connection.execute(text("INSERT INTO alembic_version VALUES ('theirs')"))
    prepare(engine)
    assert current_revision(engine) == head_revision()
    assert drift(engine) == []


def test_reading_a_database_that_is_not_there_makes_none(database_url: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="there is no Trunkline database at .* yet"):
        open_reader(database_url)
    assert list(tmp_path.glob("*.db*")) == []


def test_damage_names_a_row_that_refers_to_nothing(tmp_path: Path) -> None:
    engine = make_engine(f"sqlite:///{tmp_path / 'x.db'}")
    upgrade(engine)
    with engine.connect() as connection:
        connection.exec_driver_sql("ROLLBACK")
        connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
        connection.exec_driver_sql("BEGIN")
        connection.execute(text("INSERT INTO adapter_versions VALUES ('r9', 0, 'a', 'b', 1, '2026-01-01')"))
        connection.commit()
    assert damage(engine) == ["table adapter_versions, row 1 refers to a row of runs that is not there"]
    engine.dispose()


def test_migrations_run_from_a_copy_that_holds_python_files_only(tmp_path: Path) -> None:
    """As Flower's bundle does: it carries no .ini, .mako or .txt, and is unpacked where it likes."""
    bundle = tmp_path / "unpacked bundle"
    for package in ("contract", "storage"):
        only_python = shutil.ignore_patterns("__pycache__", "*.[!p]*", "*.proto", "*.pyi")
        shutil.copytree(ROOT / package, bundle / package, ignore=only_python)
    code = (
        "import sys, storage.store as s; assert s.__file__.startswith(sys.argv[1]), s.__file__\n"
        "s.open_store(sys.argv[2]); from storage.revisions import *; from storage.engine import make_engine\n"
        "assert drift(make_engine(sys.argv[2])) == []"
    )
    target = f"sqlite:///{tmp_path / 'bundled.db'}"
    subprocess.run([sys.executable, "-c", code, str(bundle), target], cwd=bundle, check=True, timeout=60, env={})


def test_every_module_of_the_migrations_is_named_in_the_wheel() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for package in ("storage", "storage.migrations", "storage.migrations.versions"):
        assert f'"{package}",' in pyproject
        assert (ROOT / package.replace(".", "/") / "__init__.py").is_file()


def test_a_database_of_the_first_schema_keeps_its_rows_and_gets_identities(engine: Engine, database_url: str) -> None:
    with for_writing(engine).begin() as connection:
        config = revisions._config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    tables = set(inspect(engine).get_table_names())
    assert "identities" not in tables
    moment = "'2026-01-01 00:00:00+00:00'" if engine.dialect.name == "postgresql" else "'2026-01-01 00:00:00'"
    with engine.begin() as connection:
        for statement in (
            f"INSERT INTO runs VALUES ('r1', '7', 'deployment', 'running', NULL, '{{}}', 'f', {moment}, NULL)",
            f"INSERT INTO clients VALUES ('11', 'site one', {moment})",
            f"INSERT INTO adapter_versions VALUES ('r1', 0, 'a', 'b', 5, {moment})",
            f"INSERT INTO events VALUES (1, 'r1', 'note', 'from before', '{{}}', {moment})",
        ):
            connection.execute(text(statement))
    with pytest.raises(SchemaError, match="revision 0001, this code needs .*: run `trunkline db upgrade`"):
        open_store(database_url)

    assert upgrade(engine) == ("0001", head_revision())
    assert set(inspect(engine).get_table_names()) - tables >= {"roster", "identities", "node_bindings"}
    assert drift(engine) == []
    store = open_store(database_url)
    assert store.get_run("r1").flower_run_id == "7"
    assert [client.name for client in store.clients()] == ["site one"]
    assert [version.trained_tokens for version in store.adapter_versions("r1")] == [5]
    assert [event.message for event in store.events()] == ["from before"]
    assert store.roster_version() == 0
    store.close()


def test_the_home_directorys_own_file_follows_the_code_and_a_copy_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path / "a home's"))
    monkeypatch.delenv("TRUNKLINE_DATABASE_URL", raising=False)
    file = tmp_path / "a home's" / "trunkline.db"
    first = make_engine(f"sqlite:///{file}")
    with first.begin() as connection:
        config = revisions._config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(text("INSERT INTO clients VALUES ('7', 'ward', '2026-01-01 00:00:00')"))
    open_store().close()
    assert current_revision(first) == head_revision()
    with first.connect() as connection:
        assert connection.execute(text("SELECT name FROM clients")).scalar() == "ward"
    kept = make_engine(f"sqlite:///{file}.revision-0001")
    assert current_revision(kept) == "0001"
    with kept.connect() as connection:
        assert connection.execute(text("SELECT name FROM clients")).scalar() == "ward"


@pytest.mark.parametrize(
    "place", ["file.rename", "file.written", "sql.upgrade.before", "sql.upgrade.uncommitted", "sql.upgrade.after"]
)
def test_an_upgrade_that_was_killed_anywhere_is_made_again_from_a_copy_that_is_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path))
    monkeypatch.delenv("TRUNKLINE_DATABASE_URL", raising=False)
    file = tmp_path / "trunkline.db"
    first = make_engine(f"sqlite:///{file}")
    with first.begin() as connection:
        config = revisions._config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(text("INSERT INTO clients VALUES ('7', 'ward', '2026-01-01 00:00:00')"))
    first.dispose()
    killed = subprocess.run(
        [sys.executable, "-c", "from storage.store import open_store; open_store()"],
        cwd=ROOT,
        env={**os.environ, "TRUNKLINE_FAILPOINT": f"kill:{place}#1"},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    open_store().close()
    for path, revision in ((file, head_revision()), (Path(f"{file}.revision-0001"), "0001")):
        found = make_engine(f"sqlite:///{path}")
        assert current_revision(found) == revision
        assert damage(found) == []
        with found.connect() as connection:
            assert connection.execute(text("SELECT name FROM clients")).scalar() == "ward"
        found.dispose()
