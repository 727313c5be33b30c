"""The command's table of contents: light to load, and every exit code as documented."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from contract.errors import DeadlineError
from trunkline import __version__
from trunkline.cli import EXIT_CODES, MOUNTS, app, commands
from trunkline.project import write_project

HEAVY = ("torch", "transformers", "peft", "flwr", "ray", "sqlalchemy", "grpc", "jinja2", "starlette", "uvicorn")


def trunkline(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trunkline", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["no-such-command"]])
def test_the_table_of_contents_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nsys.argv = ['trunkline', *sys.argv[1:]]\n"
        "from trunkline.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"sys.exit(','.join(name for name in {HEAVY!r} if name in sys.modules) or 0)"
    )
    answer = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, f"imported: {answer.stderr.splitlines()[-1]}"


def test_loading_every_command_imports_no_torch() -> None:
    code = (
        "import sys; from trunkline.cli import commands; names = [name for name, _ in commands()]; "
        "sys.exit('torch' if 'torch' in sys.modules else 0 if len(names) == 18 else str(names))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr


def test_help_lists_every_command_and_the_exit_codes() -> None:
    shown = " ".join(CliRunner().invoke(app, ["--help"]).output.split())
    for name, mount in MOUNTS.items():
        assert f"{name} " in shown
        assert mount.help in shown
    assert EXIT_CODES in shown


def test_version() -> None:
    assert trunkline("--version").stdout == f"trunkline {__version__}\n"


@pytest.mark.parametrize("name", list(MOUNTS))
def test_each_command_has_help_and_no_completion_options_of_its_own(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0
    assert "completion" not in result.output


def test_commands_are_all_loaded() -> None:
    assert [name for name, _ in commands()] == list(MOUNTS)


def test_shell_completion_reaches_into_lazy_commands() -> None:
    answer = trunkline(_TRUNKLINE_COMPLETE="complete_bash", COMP_WORDS="trunkline runs ", COMP_CWORD="2")
    assert answer.stdout.split() == ["list", "show", "stop", "watch", "resume", "report"]


def test_exit_code_0_for_success(tmp_path: Path) -> None:
    assert trunkline("init", str(tmp_path / "project")).returncode == 0
    assert trunkline("config", "show", str(tmp_path / "project")).returncode == 0


def test_exit_code_1_for_what_failed(tmp_path: Path) -> None:
    answer = trunkline("runs", "show", "--last", TRUNKLINE_HOME=str(tmp_path), TRUNKLINE_DATABASE_URL="")
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: ")
    assert answer.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "PROJECT"], "say where to run: --simulate N"),
        (["run", "PROJECT", "--simulate", "2", "-c", "num-round=3"], "did you mean 'num-rounds'?"),
        (["run", "PROJECT", "--simulate", "2", "-c", "junk"], "must be KEY=VALUE pairs"),
        (["run", "PROJECT", "--simulate", "1"], "secagg is on and 1 client is simulated; a sum over one hides nothing"),
        (["run", "PROJECT", "--simulate", "2", "-c", "quorum=3"], "quorum is 3 but only 2 clients are simulated"),
        (["run", "PROJECT/data", "--simulate", "2"], "no pyproject.toml in"),
        (["run", "--simulate", "none"], "not a valid int"),
        (["init", "PROJECT"], "is there and not empty"),
    ],
)
def test_exit_code_2_for_usage_and_configuration(tmp_path: Path, arguments: list[str], said: str) -> None:
    project = tmp_path / "project"
    write_project(project)
    answer = trunkline(*(argument.replace("PROJECT", str(project)) for argument in arguments))
    assert answer.returncode == 2
    assert said in " ".join(answer.stderr.replace("│", " ").split())


def test_wrong_usage_is_told_as_the_page_says_also_where_json_is_wanted() -> None:
    for arguments in (["rounds", "list", "--nope", "-o", "json"], ["run", "--simulate", "none", "-o", "json"]):
        answer = trunkline(*arguments)
        assert (answer.returncode, answer.stdout) == (2, "")
        assert answer.stderr.startswith("Usage: trunkline ")
        assert "Error" in answer.stderr


def test_exit_code_3_when_nobody_answers(tmp_path: Path) -> None:
    write_project(tmp_path / "project")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        answer = trunkline("run", str(tmp_path / "project"), "--superlink", address, TRUNKLINE_HOME=str(tmp_path))
    assert answer.returncode == 3
    assert f"error: no SuperLink answers at {address}" in answer.stderr
    assert "logs" not in answer.stderr, "nothing ran, so there is no log to keep"


def test_exit_code_3_when_the_trunk_is_not_there(tmp_path: Path) -> None:
    write_project(tmp_path / "project")
    answer = trunkline("run", str(tmp_path / "project"), "--simulate", "2", "--trunk", "127.0.0.1:9")
    assert answer.returncode == 3
    assert "error: trunk at 127.0.0.1:9 does not answer" in answer.stderr


def test_exit_code_2_when_the_cut_leaves_the_trunk_nothing(tmp_path: Path) -> None:
    write_project(tmp_path / "project")
    answer = trunkline("run", str(tmp_path / "project"), "--simulate", "2", "-c", "head-layers=50")
    assert answer.returncode == 2
    assert "leave no layer for the trunk" in answer.stderr


def test_exit_code_4_when_a_wait_runs_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def give_up(*arguments: object, **options: object) -> None:
        raise DeadlineError("the trunk server was not ready within 600 s")

    monkeypatch.setattr("trunkline.demo.run_demo", give_up)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 4
    assert result.stderr == "error: the trunk server was not ready within 600 s\n"
