"""`trunkline db gc` removes what no committed round names, and nothing else."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from orchestrator.db_cli import app
from storage.artifacts import ArtifactStore
from storage.store import Store, open_store


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database_url: str) -> Path:
    """A home whose database is elsewhere, or on a server."""
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TRUNKLINE_DATABASE_URL", database_url)
    return tmp_path / "home"


@pytest.fixture
def artifacts(home: Path) -> ArtifactStore:
    return ArtifactStore(home / "artifacts")


@pytest.fixture
def kept(database_url: str, artifacts: ArtifactStore) -> Store:
    """A store with one committed version."""
    store = open_store(database_url)
    store.create_run("r1", "7", {}, "simulation", "f")
    store.add_adapter_version("r1", 0, aged(artifacts, b"client", 100), aged(artifacts, b"trunk", 100))
    return store


def aged(artifacts: ArtifactStore, data: bytes, hours: float) -> str:
    sha256 = artifacts.put(data)
    moment = time.time() - 3600 * hours
    os.utime(artifacts.path(sha256), (moment, moment))
    return sha256


def gc(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["gc", *arguments, "-o", "json"])


def names(home: Path) -> set[str]:
    return {path.name for path in (home / "artifacts").iterdir()}


def test_only_old_files_that_no_version_names_are_removed(home: Path, artifacts: ArtifactStore, kept: Store) -> None:
    before = names(home)
    aged(artifacts, b"an orphan", 30)
    young = artifacts.path(aged(artifacts, b"a round that is about to commit", 2)).name
    partial = home / "artifacts" / ".partial-0123"
    partial.write_bytes(b"half")
    os.utime(partial, (0, 0))
    (home / "artifacts" / "notes.txt").write_text("a person's")
    done = gc("--yes")
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["data"]) == 2
    assert names(home) == before | {young, "notes.txt"}


def test_a_dry_run_says_what_would_go_and_removes_nothing(home: Path, artifacts: ArtifactStore, kept: Store) -> None:
    orphan = aged(artifacts, b"an orphan", 30)
    before = names(home)
    done = gc("--dry-run")
    assert [row["file"] for row in json.loads(done.stdout)["data"]] == [f"{orphan}.safetensors"]
    assert "1 files, 0.0 MB would be removed" in done.stderr
    assert names(home) == before


def test_without_a_terminal_it_is_refused_unless_yes_is_given(
    home: Path, artifacts: ArtifactStore, kept: Store
) -> None:
    aged(artifacts, b"an orphan", 30)
    before = names(home)
    done = gc()
    assert done.exit_code == 2
    assert "there is no terminal to ask at: give --yes" in done.stderr
    assert names(home) == before


def test_another_databases_adapters_are_not_taken_for_orphans(
    home: Path, artifacts: ArtifactStore, kept: Store
) -> None:
    open_store(f"sqlite:///{home / 'trunkline.db'}").close()
    aged(artifacts, b"perhaps the other's", 30)
    before = names(home)
    done = gc("--yes")
    assert done.exit_code == 2
    assert "may hold adapters of the database" in done.stderr
    assert names(home) == before


def test_a_home_without_artifacts_has_nothing_to_remove(home: Path, database_url: str) -> None:
    open_store(database_url).close()
    done = gc("--yes")
    assert (done.exit_code, json.loads(done.stdout)["data"]) == (0, [])


def test_a_database_that_names_none_of_the_adapters_is_not_believed(
    home: Path, artifacts: ArtifactStore, database_url: str
) -> None:
    open_store(database_url).close()
    aged(artifacts, b"another database's", 30)
    done = gc("--yes")
    assert done.exit_code == 2
    assert "is of the database that is asked: is it the right one?" in done.stderr
    assert len(names(home)) == 1


def test_what_is_put_again_is_young_again(home: Path, artifacts: ArtifactStore, kept: Store) -> None:
    before = names(home)
    old = aged(artifacts, b"of an attempt that was cut off", 30)
    assert artifacts.put(b"of an attempt that was cut off") == old
    assert json.loads(gc("--yes").stdout)["data"] == []
    assert names(home) == before | {f"{old}.safetensors"}


def test_what_was_committed_while_a_person_was_asked_stays(
    home: Path, artifacts: ArtifactStore, kept: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = aged(artifacts, b"committed meanwhile", 30)

    def agree(*_: object, **__: object) -> None:
        kept.create_run("r2", "8", {}, "simulation", "f")
        kept.add_adapter_version("r2", 0, sha256, sha256)

    monkeypatch.setattr("orchestrator.db_cli.require_agreed", agree)
    assert json.loads(gc().stdout)["data"] == []
    assert artifacts.has(sha256)


def test_what_is_removed_is_in_the_audit_log_by_its_name(home: Path, artifacts: ArtifactStore, kept: Store) -> None:
    orphan = artifacts.path(aged(artifacts, b"an orphan", 30)).name
    assert gc("--yes", "--operator", "ada").exit_code == 0
    assert gc("--yes", "--operator", "bob").exit_code == 0, "nothing is left to remove"
    (entry,) = kept.audit_log()
    assert (entry.operator, entry.action, entry.target) == ("ada", "artifacts-removed", str(home / "artifacts"))
    assert entry.detail == {"files": 1, "bytes": len(b"an orphan"), "names": [orphan]}
