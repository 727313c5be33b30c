"""The doctor names what is wrong and what to do about it."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner

from storage.store import open_store
from trunkline import doctor
from trunkline.cli import app
from trunkline.doctor import NotReadyError


def test_every_check_passes_or_says_its_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path / "home"))
    result = CliRunner().invoke(app, ["doctor", "-o", "json"])
    findings = {one["check"]: one for one in json.loads(result.stdout)["data"]}
    assert {"python", "packages", "torch", "flower", "disk", "home", "database", "ports", "demo"} <= set(findings)
    for name, one in findings.items():
        assert (one["result"] in ("PASS", "SKIP")) == (one["fix"] is None), name
    for name in ("python", "torch", "flower", "home", "database", "ports"):
        assert findings[name]["result"] == "PASS", findings[name]
    failed = any(one["result"] == "FAIL" for one in findings.values())
    assert result.exit_code == int(failed)


def test_a_failed_check_is_exit_code_1_and_a_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(doctor, "check_torch", lambda: "not looked at")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("FAIL  home"))
    assert lines[at + 1] == "      fix: set TRUNKLINE_HOME to a directory you may write to"
    told = CliRunner().invoke(app, ["doctor", "-o", "json"])
    answer = json.loads(told.stdout)
    assert (told.exit_code, answer["status"]) == (1, "ok")
    assert "FAIL" in {finding["result"] for finding in answer["data"]}


def test_a_database_newer_than_the_code_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRUNKLINE_DATABASE_URL", f"sqlite:///{tmp_path}/runs.db")
    assert doctor.check_database().endswith("made by the first run")
    open_store().close()
    assert doctor.check_database().endswith("schema is current")
    with sqlite3.connect(tmp_path / "runs.db") as connection:
        connection.execute("update trunkline_schema set version_num = '9999'")
    with pytest.raises(NotReadyError, match="newer schema"):
        doctor.check_database()


def test_a_trunk_that_does_not_answer_is_named() -> None:
    with pytest.raises(NotReadyError, match=r"127\.0\.0\.1:9 does not answer"):
        doctor.check_trunk("127.0.0.1:9")


def test_of_several_trunks_each_must_answer_and_be_an_address() -> None:
    with pytest.raises(NotReadyError, match=r"127\.0\.0\.1:9 does not answer"):
        doctor.check_trunk("127.0.0.1:9,127.0.0.1:10")
    result = CliRunner().invoke(app, ["doctor", "--trunk", "127.0.0.1:9,garbage"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "one of its addresses is 'garbage'; it must be HOST:PORT" in result.stderr


@pytest.mark.parametrize("address", ["garbage", "host:", ":1", "host:99999", "host:0", "host:1_0"])
def test_an_address_that_is_none_is_told_before_anything_is_checked(address: str) -> None:
    result = CliRunner().invoke(app, ["doctor", "--trunk", address])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == f"error: trunk is {address!r}; it must be HOST:PORT\n"


def test_missing_programs_of_flower_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "scripts_dir", lambda: tmp_path)
    with pytest.raises(NotReadyError, match="flwr, flower-superlink"):
        doctor.check_flower()


def test_too_little_memory_or_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NEEDED_MEMORY_BYTES", 10**18)
    monkeypatch.setattr(doctor, "NEEDED_DISK_BYTES", 10**18)
    for check in (doctor.check_machine, doctor.check_disk):
        with pytest.raises(NotReadyError) as found:
            check()
        assert found.value.fix.startswith("free some")
