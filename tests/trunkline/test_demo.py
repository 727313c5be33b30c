"""What the demo tells at its end."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from trunkline import demo


@pytest.mark.parametrize("case", ["on the path", "not on the path", "not installed"])
def test_the_next_commands_can_be_pasted_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    scripts, elsewhere = tmp_path / "my scripts", tmp_path / "elsewhere"
    for folder in (scripts, elsewhere):
        folder.mkdir()
        (folder / "trunkline").write_text("#!/bin/sh\n")
        (folder / "trunkline").chmod(0o755)
    monkeypatch.setattr(demo, "scripts_dir", lambda: scripts)
    monkeypatch.setenv("PATH", str(scripts if case == "on the path" else elsewhere))
    if case == "not installed":
        (scripts / "trunkline").unlink()
    expected = {
        "on the path": ["trunkline"],
        "not on the path": [str(scripts / "trunkline")],
        "not installed": [sys.executable, "-m", "trunkline"],
    }[case]
    commands = [shlex.split(command) for command in demo._next_commands(tmp_path / "an adapter")]
    assert [command[: len(expected)] for command in commands] == [expected] * 4
    assert commands[2][len(expected) :] == ["adapter", "verify", str(tmp_path / "an adapter")]
