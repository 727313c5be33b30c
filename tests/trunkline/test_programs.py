"""In a path with spaces Flower's programs run under an interpreter whose path has none: Ray needs that."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from trunkline.programs import runnable_scripts, scripts_dir


def test_without_spaces_the_installed_programs_are_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/venv/bin/python")
    assert runnable_scripts(tmp_path) == scripts_dir()
    assert list(tmp_path.iterdir()) == []


def test_with_spaces_each_program_starts_under_a_path_that_is_one_word(tmp_path: Path) -> None:
    environment = tmp_path / "an environment with spaces"
    venv.create(environment, symlinks=True)
    elsewhere = Path("/tmp") / f"tl-programs-{os.getpid()}"
    elsewhere.mkdir()
    code = f"import sys; from pathlib import Path; {show(runnable_scripts)}(Path({str(elsewhere)!r}))"
    checkout, libraries = Path(__file__).resolve().parents[2], os.pathsep.join(entry for entry in sys.path if entry)
    within = {**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout), libraries])}
    subprocess.run([environment / "bin" / "python", "-c", code], env=within, check=True, timeout=60)
    names = {path.name for path in (elsewhere / "bin").iterdir()}
    assert {"flwr", "flower-superlink", "flower-superexec", "flwr-simulation", "flwr-clientapp"} <= names
    said = subprocess.run(
        [elsewhere / "bin" / "flwr", "--version"], env=within, capture_output=True, text=True, timeout=60
    )
    assert said.stdout.startswith("Flower version: 1.41"), said.stderr
    asked = [elsewhere / "env" / "bin" / "python", "-c", "import sys; print(sys.executable, sys.prefix)"]
    told = subprocess.run(asked, capture_output=True, text=True, timeout=60).stdout.split()
    assert told == [str(elsewhere / "env" / "bin" / "python"), str(elsewhere / "env")]
    shutil.rmtree(elsewhere)


def show(function: object) -> str:
    """An expression for `function` in another interpreter."""
    return f"__import__({function.__module__!r}, fromlist=['_']).{getattr(function, '__name__', '')}"
