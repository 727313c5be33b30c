"""`make setup` says what is missing, prefers the CPU build of torch, and does nothing twice."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "scripts" / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Pip:
    """Stands for pip: keeps what it was asked for, and has no CPU build unless told."""

    def __init__(self, has_cpu_build: bool) -> None:
        self.has_cpu_build = has_cpu_build
        self.asked: list[list[str]] = []

    def __call__(self, arguments: list[str]) -> bool:
        self.asked.append(arguments)
        return self.has_cpu_build or not arguments[-1].endswith("+cpu")


def test_a_missing_python3_venv_is_named(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else object())
    assert setup.make_venv() is False
    said = capsys.readouterr().err
    assert said.startswith("error: python3-venv is missing")
    assert "sudo apt-get install python3.11-venv" in said


@pytest.mark.parametrize("index", ["", "file:///wheels"])
def test_without_a_driver_the_cpu_build_is_taken_where_pip_finds_it(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], index: str
) -> None:
    pip = Pip(has_cpu_build=True)
    monkeypatch.setattr(setup, "pip", pip)
    monkeypatch.setattr(setup, "has_nvidia_driver", lambda: False)
    monkeypatch.setenv("TORCH_CPU_INDEX", index)
    assert setup.install_torch()
    assert pip.asked == [["--no-deps", *(["--extra-index-url", index] if index else []), "torch==2.13.0+cpu"]]
    assert "took the CPU build" in capsys.readouterr().out


def test_without_a_cpu_build_the_size_is_told_before_the_default_is_fetched(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told_before: list[str] = []
    pip = Pip(has_cpu_build=False)

    def asked(arguments: list[str]) -> bool:
        told_before.append(capsys.readouterr().out)
        return pip(arguments)

    monkeypatch.setattr(setup, "pip", asked)
    monkeypatch.setattr(setup, "has_nvidia_driver", lambda: False)
    assert setup.install_torch()
    assert pip.asked[-1] == ["torch==2.13.0"]
    assert "GB" in told_before[-1]


def test_with_a_driver_the_default_build_is_taken_at_once(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = Pip(has_cpu_build=True)
    monkeypatch.setattr(setup, "pip", pip)
    monkeypatch.setattr(setup, "has_nvidia_driver", lambda: True)
    assert setup.install_torch()
    assert pip.asked == [["torch==2.13.0"]]


def test_nothing_is_done_where_nothing_changed(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python, stamp = tmp_path / "python", tmp_path / "stamp"
    python.write_text("")
    stamp.write_text(setup.place() + setup.dependencies())
    monkeypatch.setattr(setup, "VENV_PYTHON", python)
    monkeypatch.setattr(setup, "STAMP", stamp)
    monkeypatch.setattr(setup, "pip", None)
    monkeypatch.setattr(setup, "make_venv", None)
    assert setup.main() == 0
    assert capsys.readouterr().out == "setup: .venv is up to date\n"


def test_changed_dependencies_go_into_the_venv_that_is_there_and_a_moved_checkout_gets_a_new_one(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python, stamp = tmp_path / "python", tmp_path / "stamp"
    python.write_text("")
    made: list[str] = []
    compiled: list[str] = []
    monkeypatch.setattr(setup, "VENV_PYTHON", python)
    monkeypatch.setattr(setup, "STAMP", stamp)
    monkeypatch.setattr(setup, "pip", lambda arguments: True)
    monkeypatch.setattr(setup, "compile_modules", lambda: compiled.append("modules"))
    monkeypatch.setattr(setup, "make_venv", lambda: made.append("venv") or True)
    stamp.write_text(setup.place() + "other dependencies\n")
    assert setup.main() == 0
    assert made == []
    monkeypatch.setattr(setup, "ROOT", tmp_path / "elsewhere")
    monkeypatch.setattr(setup, "dependencies", lambda: "same\n")
    assert setup.main() == 0
    assert made == ["venv"]
    assert compiled == ["modules", "modules"]


def test_modules_are_compiled_but_for_what_is_seldom_imported(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    venv = tmp_path / "tests" / ".venv"  # a checkout may lie in a folder of any name
    monkeypatch.setattr(setup, "VENV", venv)
    monkeypatch.setattr(setup, "VENV_PYTHON", Path(sys.executable))
    monkeypatch.setattr(setup, "LOG", tmp_path / "setup.log")
    packages = venv / "lib" / "python3.11" / "site-packages"
    for name in ("torch/nn.py", "torch/template.py", "torch/tests/test_nn.py", "transformers/models/llama.py"):
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_text("{{ no Python }" if "template" in name else "x = 1\n")
    setup.compile_modules()
    assert [path.name for path in packages.rglob("*.pyc")] == ["nn.cpython-311.pyc"]
    assert "template.py" in (tmp_path / "setup.log").read_text()


def test_the_lock_pins_every_dependency_once(setup: ModuleType) -> None:
    pinned = [line.partition("==")[0].lower() for line in setup.LOCK.read_text().splitlines() if "==" in line]
    assert len(pinned) == len(set(pinned))
    for name in ("torch", "flwr", "transformers", "peft", "grpcio", "sqlalchemy", "opacus", "cryptography"):
        assert name in pinned
    assert "+cpu" not in setup.LOCK.read_text(), "the lock has to fit every build"


def test_make_alone_is_a_line_of_help_for_each_target() -> None:
    shown = subprocess.run(
        ["make", "-C", str(ROOT), "--no-print-directory"], capture_output=True, text=True, timeout=30
    )
    assert shown.returncode == 0, sys.version
    targets = {line.split()[1]: line.split()[2:] for line in shown.stdout.splitlines()}
    assert {"setup", "demo", "demo-deploy", "test", "lint", "bench", "clean"} <= set(targets)
    assert all(len(words) >= 3 for words in targets.values())
