"""Which database the environment names, and that a password's file is its owner's alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from contract.errors import ConfigError
from storage.home import database_url, names_database

URL = "postgresql://trunkline:s3cret@db.example/trunkline"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path))
    monkeypatch.delenv("TRUNKLINE_DATABASE_URL", raising=False)


def test_a_url_in_a_file_is_read_as_one_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (database_url(), names_database()) == (f"sqlite:///{tmp_path}/trunkline.db", False)
    path = tmp_path / "url"
    path.touch(0o600)
    path.write_text(f"{URL}\n")
    monkeypatch.setenv("TRUNKLINE_DATABASE_URL_FILE", str(path))
    assert (database_url(), names_database()) == (URL, True)
    monkeypatch.setenv("TRUNKLINE_DATABASE_URL", URL)
    with pytest.raises(ConfigError, match="are both set; each names the database"):
        database_url()


@pytest.mark.parametrize(
    ("text", "mode", "told"),
    [(URL, 0o640, r"url \(mode 0640\): run `chmod 600 "), (" \n", 0o600, "url, which is empty")],
)
def test_a_file_that_others_read_or_that_is_empty_is_refused_without_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, mode: int, told: str
) -> None:
    path = tmp_path / "url"
    path.write_text(text)
    path.chmod(mode)
    monkeypatch.setenv("TRUNKLINE_DATABASE_URL_FILE", str(path))
    with pytest.raises(ConfigError, match=told) as caught:
        database_url()
    assert "s3cret" not in str(caught.value)
