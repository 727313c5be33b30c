"""A ClientApp whose SuperNode is gone ends, whatever its main thread waits for."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from clients.starter import WATCHES

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT_S = 60.0
WAITS = """
import signal, sys, threading
from pathlib import Path
from clients.starter import end_after_starter
def tell(what):
    Path(sys.argv[1] + ".new").write_text(what)
    Path(sys.argv[1] + ".new").rename(sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)
end_after_starter(float(sys.argv[2]))
tell("waits")
while True:
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        tell("interrupted")
        if sys.argv[3] == "heeds":
            break
"""
STARTS = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); sys.stdin.read()"


def started(told: Path, *arguments: str) -> tuple[psutil.Process, subprocess.Popen[str]]:
    """A process in a wait without a limit, and the one that started it."""
    argv = [sys.executable, "-c", STARTS, sys.executable, "-c", WAITS, str(told), "3", *arguments]
    starter = subprocess.Popen(argv, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    waiting = psutil.Process(int(starter.stdout.readline()))
    until = time.monotonic() + LIMIT_S
    while not told.exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    return waiting, starter


@pytest.mark.parametrize("heeds", ["heeds", "goes on"])
def test_it_is_interrupted_and_then_ended_once_its_starter_is_gone(tmp_path: Path, heeds: str) -> None:
    waiting, starter = started(tmp_path / "told", heeds, WATCHES, "1")
    assert (tmp_path / "told").read_text() == "waits"
    starter.kill()
    starter.wait()
    psutil.wait_procs([waiting], timeout=LIMIT_S)
    assert not waiting.is_running() or waiting.status() == psutil.STATUS_ZOMBIE
    assert (tmp_path / "told").read_text() == "interrupted"


def test_what_flower_was_not_told_to_watch_outlives_its_starter(tmp_path: Path) -> None:
    waiting, starter = started(tmp_path / "told", "heeds")
    starter.kill()
    starter.wait()
    time.sleep(3.0)
    try:
        assert (waiting.status(), (tmp_path / "told").read_text()) == (psutil.STATUS_SLEEPING, "waits")
    finally:
        waiting.kill()
