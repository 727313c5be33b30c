"""The `trunkline` command as a person starts it, in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `trunkline ARGUMENTS` with its own home, from the root directory; ended with the test."""
    started: list[subprocess.Popen[str]] = []
    # What these tests are told to ignore themselves, the commands would ignore too.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def begin(home: str, *arguments: str) -> subprocess.Popen[str]:
        log = (tmp_path / f"{home}.log").open("w")
        process = subprocess.Popen(
            [sys.executable, "-m", "trunkline", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd="/",
            env={**os.environ, "TRUNKLINE_HOME": str(tmp_path / home), "TRUNKLINE_DATABASE_URL": ""},
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.terminate()
        process.wait(60)
