"""`trunkline runs report` writes one file, whole or not at all, and says where."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from tests.trunkline.pages.cases import Case, case_at, eventful, url_in
from trunkline.runs import runs_app

RUN = "20260101-120000-abcd"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path))
    monkeypatch.delenv("TRUNKLINE_DATABASE_URL", raising=False)
    return tmp_path


@pytest.fixture
def filled(home: Path) -> Case:
    with case_at(url_in(home)) as case:
        return eventful(case)


def report(*arguments: str | Path) -> Result:
    return CliRunner().invoke(runs_app, ["report", *map(str, arguments)])


def test_it_lies_beside_the_runs_adapter_for_its_owner_alone(home: Path, filled: Case) -> None:
    done = report("--last", "-o", "json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)["data"]
    path = home / "runs" / RUN / "report.html"
    assert told == {"run": RUN, "status": "running", "report": str(path), "size_bytes": path.stat().st_size}
    assert path.stat().st_mode & 0o077 == 0
    assert path.read_text().startswith("<!doctype html>")


def test_it_goes_where_it_is_told_over_an_earlier_one(tmp_path: Path, filled: Case) -> None:
    path = tmp_path / "mine.html"
    path.write_text("old")
    assert report(RUN, "--out", path).exit_code == 0
    assert RUN in path.read_text()
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith(".")] == []


def test_where_it_cannot_be_written_it_says_so(tmp_path: Path, filled: Case) -> None:
    refused = report(RUN, "--out", tmp_path)
    assert (refused.exit_code, "which is a directory; name a file" in refused.stderr) == (2, True)
    refused = report(RUN, "--out", tmp_path / "absent" / "report.html")
    assert (refused.exit_code, "No such file or directory" in refused.stderr) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ((), 2, "name one run: RUN or --last"),
        ((RUN, "--last"), 2, "not both"),
        (("nobody",), 1, "there is no run nobody"),
    ],
)
def test_a_run_that_is_not_named_or_not_there_is_told(
    filled: Case, arguments: tuple[str, ...], code: int, told: str
) -> None:
    refused = report(*arguments)
    assert (refused.exit_code, told in refused.stderr, refused.stdout) == (code, True, "")


def test_without_a_database_nothing_is_made(home: Path) -> None:
    refused = report("--last")
    assert (refused.exit_code, "there is no Trunkline database" in refused.stderr) == (1, True)
    assert list(home.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_is_not_ours_is_told(tmp_path: Path, filled: Case) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    refused = report(RUN, "--out", closed / "report.html")
    assert (refused.exit_code, "Permission denied" in refused.stderr) == (1, True)
