"""The systemd units: systemd takes them, their programs know the options, and their state is their own."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
        pytest.skip("systemd is not installed")
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
    program, *words = command.split()
    subcommands = [word for word in words[:2] if not word.startswith("-")]
    done = subprocess.run(
        [str(PROGRAMS / Path(program).name), *subcommands, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={"COLUMNS": "200", "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
    )
    options = [word for word in words if word.startswith("--")]
    assert options
    assert [option for option in options if option not in done.stdout] == []


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_it_runs_as_nobody_special_and_keeps_its_state_to_itself(unit: Path) -> None:
    (user,) = setting(unit, "User")
    assert user.startswith("trunkline")
    assert setting(unit, "StateDirectoryMode") == ["0700"]
    assert setting(unit, "NoNewPrivileges") == ["yes"]
    assert setting(unit, "ProtectSystem") == ["strict"]
    assert setting(unit, "UMask") == ["0077"]
    text = unit.read_text(encoding="utf-8")
    assert "key:/etc" in text or "key" not in setting(unit, "ExecStart")[0], "keys come as credentials"
