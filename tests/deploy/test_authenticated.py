"""The authenticated deployment: its commands are there, and ended early it leaves nothing. CI runs it whole."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.deploy.command_lines import PROGRAMS, ROOT, faults, shell_commands

SCRIPT = ROOT / "deploy" / "authenticated" / "run"
LIMIT_S = 200.0
pytestmark = pytest.mark.timeout(2 * LIMIT_S + 60)


def test_its_commands_are_there() -> None:
    called = shell_commands(SCRIPT)
    programs = {words[0] for words in called}
    assert programs == {"trunkline", "flower-superlink", "flower-supernode"}
    assert [fault for words in called for fault in faults(words)] == []


@pytest.fixture
def script(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The script as a terminal starts it, with all that it makes under `tmp_path`; its output goes to `said`."""
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{PROGRAMS}:{environment['PATH']}"
    environment.pop("TRUNKLINE_DATABASE_URL", None)
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            [str(SCRIPT)],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    yield process
    process.kill()
    process.wait()
    for left in family(tmp_path):
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()


def family(place: Path) -> dict[psutil.Process, str]:
    """Who was started by the script whose directory lies in `place`, and as what.

    Each command line is read once: the script's short commands end between two reads.
    """
    found = {}
    for process in psutil.process_iter():
        try:
            told = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if f"{place}/trunkline-auth." in told:
            found[process] = told
    return found


def until(happens: Callable[[], bool], place: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not happens():
        assert time.monotonic() < deadline, (place / "said").read_text()[-3000:]
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ended_early_it_leaves_no_process(
    script: subprocess.Popen[bytes], tmp_path: Path, number: signal.Signals
) -> None:
    def serves() -> bool:
        return script.poll() is not None or any("flower-superexec" in told for told in family(tmp_path).values())

    until(serves, tmp_path)
    assert script.poll() is None, (tmp_path / "said").read_text()[-3000:]
    if number == signal.SIGINT:
        os.killpg(script.pid, number)  # as Ctrl-C does: to all in the terminal's foreground
    else:
        script.send_signal(number)
    code = script.wait(LIMIT_S)
    until(lambda: not family(tmp_path), tmp_path)
    if number == signal.SIGINT:
        assert code == 130, (tmp_path / "said").read_text()[-3000:]
        assert list(tmp_path.glob("trunkline-auth.*")) == []
