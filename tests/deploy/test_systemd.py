"""The systemd units: systemd takes them, their programs know the options, and their state is their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.command_lines import ROOT, faults

UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
PROGRAMS = Path(sys.executable).parent


def setting(unit: Path, name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", unit.read_text(encoding="utf-8"), re.MULTILINE)


def test_there_is_a_unit_for_each_part() -> None:
    assert [unit.name for unit in UNITS] == [
        "trunkline-site@.service",
        "trunkline-superlink.service",
        "trunkline-trunk.service",
    ]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_finds_no_fault_in_a_unit(unit: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        told = "systemd is not installed (Debian: apt-get install systemd)"
        pytest.fail(told) if os.environ.get("CI") else pytest.skip(told)
    # It wants the program to be there.
    text = unit.read_text(encoding="utf-8").replace("/opt/trunkline/bin/", f"{PROGRAMS}/")
    copy = tmp_path / unit.name.replace("@.", "@north.")
    copy.write_text(text, encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_its_program_knows_every_option(unit: Path) -> None:
    (command,) = setting(unit, "ExecStart")
    assert faults(command.split()) == []


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_it_runs_as_nobody_special_and_keeps_its_state_to_itself(unit: Path) -> None:
    (user,) = setting(unit, "User")
    assert user.startswith("trunkline")
    assert setting(unit, "StateDirectoryMode") == ["0700"]
    assert setting(unit, "NoNewPrivileges") == ["yes"]
    assert setting(unit, "ProtectSystem") == ["strict"]
    assert setting(unit, "UMask") == ["0077"]
    assert setting(unit, "CapabilityBoundingSet") == [""]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_keys_are_credentials_or_files_that_our_program_checks_itself(unit: Path) -> None:
    (command,) = setting(unit, "ExecStart")
    given = {word.partition(":")[0] for word in setting(unit, "LoadCredential")}
    for key in re.findall(r"\S+\.key", command):
        credential = key.removeprefix("${CREDENTIALS_DIRECTORY}/")
        assert credential in given if "trunkline trunk serve" not in command else key.startswith("/etc/trunkline/")
    assert all("://" not in told for told in setting(unit, "Environment")), "a password is no one's to read here"


def test_each_part_has_a_user_of_its_own() -> None:
    users = [setting(unit, "User")[0] for unit in UNITS]
    assert len(set(users)) == len(users)
