"""What `trunkline run` refuses before it starts anything, and what a deployed run tells the sites."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
from typer.testing import CliRunner

from contract.config import RunConfig
from demo.settings import MODEL_DIR
from trunkline import run as run_command
from trunkline.cli import app
from trunkline.flower import SuperLinkAddress
from trunkline.project import write_project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def started(*_: object) -> NoReturn:
        raise AssertionError("something is started")

    monkeypatch.setattr(run_command, "open_workplace", started)
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TRUNKLINE_DATABASE_URL", raising=False)
    write_project(tmp_path / "project")
    return tmp_path / "project"


def refusal(project: Path, *arguments: str) -> tuple[int, str]:
    """The exit code and the last line of `trunkline run PROJECT --simulate 2 ARGUMENTS`."""
    done = CliRunner().invoke(app, ["run", str(project), "--simulate", "2", *arguments])
    if isinstance(done.exception, AssertionError):
        return 0, str(done.exception)
    return done.exit_code, done.stderr.splitlines()[-1]


def test_a_sound_simulation_is_started(project: Path) -> None:
    assert refusal(project) == (0, "something is started")
    assert refusal(project, "-c", "data='stdlib:{partition}'") == (0, "something is started")
    assert refusal(project, "-c", "model=some/hub-id") == (0, "something is started")


def test_a_client_without_a_file_is_named(project: Path) -> None:
    code, told = refusal(project, "--simulate", "3")
    assert code == 2
    assert "names no file for simulated client 2" in told
    assert f"{project}/data/client-2.jsonl is not there" in told
    for data in ("gone.jsonl", "gone/{partition}.jsonl", "data", "~/no-such-file.jsonl"):
        code, told = refusal(project, "-c", f"data='{data}'")
        assert (code, "names no file for simulated client 0" in told) == (2, True), told


def test_a_file_beside_whoever_starts_the_run_is_not_the_projects(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert refusal(project, "-c", "data=here.jsonl")[0] == 2


@pytest.mark.parametrize("model", ["gone", "/gone/model", "./gone/model", "~/gone", "a/b/c", "../gone"])
def test_a_model_that_is_neither_a_directory_nor_a_hub_id_is_named(project: Path, model: str) -> None:
    code, told = refusal(project, "-c", f"model='{model}'")
    assert code == 1
    assert f"model {model!r} is not a directory" in told


def test_a_model_in_the_project_is_taken(project: Path) -> None:
    shutil.copytree(MODEL_DIR, project / "model")
    assert refusal(project, "-c", "model=model") == (0, "something is started")


def test_a_home_that_holds_no_store_is_named(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "trunkline.db").write_text("this is no database")
    code, told = refusal(project)
    assert code == 1
    assert "not a database" in told


def test_a_deployed_run_does_not_tell_the_sites_where_the_operator_keeps_data(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[RunConfig] = []

    @contextmanager
    def nowhere(_: int) -> Iterator[None]:
        yield

    monkeypatch.setattr(run_command, "open_workplace", nowhere)
    monkeypatch.setattr(run_command, "run_to_end", lambda _, config, __: told.append(config))
    config = run_command.project_config(project, [])
    assert str(project) in config.data
    run_command.run_deployed(config, SuperLinkAddress("127.0.0.1:9"))
    assert [one.data for one in told] == [""]
    assert told[0].model_copy(update={"data": config.data}) == config
