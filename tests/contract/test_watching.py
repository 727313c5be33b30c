"""`--watch`: a line for each change, and none without; what a look raises, or Ctrl-C, ends it as any command."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from contract import watching
from contract.errors import ConnectionFailedError
from contract.output import OutputFormat, OutputOption, cli_errors
from contract.watching import Look, watch

ROOT = Path(__file__).parents[2]
LIMIT_S = 120.0


def app_of(look: Callable[[], Look]) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @cli_errors
    def show(output: OutputOption = OutputFormat.TABLE) -> None:
        watch(look, output)

    return app


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching.time, "sleep", lambda seconds: None)


@pytest.mark.parametrize("arguments", [(), ("-o", "json"), ("-o", "jsonl")])
def test_without_a_terminal_each_line_is_the_whole_answer_when_it_changed(arguments: tuple[str, ...]) -> None:
    looks = iter([[1], [1], [1, 2], [1, 2], [], []])
    left = [6]

    def look() -> Look:
        left[0] -= 1
        return Look(next(looks), "a title", final=left[0] == 0)

    done = CliRunner().invoke(app_of(look), list(arguments))
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["data"] for line in lines] == [[1], [1, 2], []]
    assert {line["status"] for line in lines} == {"ok"}
    assert left == [0]


def test_what_a_look_raises_ends_the_watch_with_its_exit_code() -> None:
    looks = iter([["here"]])

    def look() -> Look:
        for found in looks:
            return Look(found)
        raise ConnectionFailedError("it is gone")

    done = CliRunner().invoke(app_of(look), ["-o", "jsonl"])
    assert done.exit_code == 3
    first, last = (json.loads(line) for line in done.stdout.splitlines())
    assert (first["data"], last["status"], last["error"]["message"]) == (["here"], "error", "it is gone")


def test_ctrl_c_is_exit_code_130_without_a_traceback() -> None:
    def look() -> Look:
        raise KeyboardInterrupt

    done = CliRunner().invoke(app_of(look), ["-o", "jsonl"])
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_a_watch_that_has_nothing_new_to_print_ends_when_nobody_reads_it() -> None:
    quiet = SCRIPT.replace('f"times-{next(count)}"', '"the same"')
    watching_process = subprocess.Popen(
        [sys.executable, "-c", quiet], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    if watching_process.stdout is None:
        raise RuntimeError("no pipe")
    try:
        assert b"the same" in watching_process.stdout.readline()
        watching_process.stdout.close()
        assert watching_process.wait(LIMIT_S) == 1
    finally:
        watching_process.kill()
        watching_process.wait(10)


def test_who_watches_waits_longer_the_longer_a_look_takes() -> None:
    assert watching._pause_s(0.0) == watching.PAUSE_S
    assert watching._pause_s(0.5) == 2.0
    assert watching._pause_s(60.0) == watching.LONGEST_PAUSE_S


SCRIPT = """
import itertools, sys, typer
from contract.output import OutputFormat, OutputOption, cli_errors
from contract.watching import Look, watch
app, count = typer.Typer(), itertools.count(1)
@app.command()
@cli_errors
def show(output: OutputOption = OutputFormat.TABLE) -> None:
    watch(lambda: Look([{"looked": f"times-{next(count)}"}], "a title"), output)
app()
"""


def test_on_a_terminal_it_is_drawn_anew_until_ctrl_c() -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
        preexec_fn=_take_terminal,
    )
    os.close(theirs)
    try:
        shown = _read_until(ours, "times-3")
        os.write(ours, b"\x03")  # as the key does: the terminal sends the signal
        shown += _read_until(ours, "interrupted")
        assert process.wait(LIMIT_S) == 130
    finally:
        process.kill()
        process.wait(10)
        os.close(ours)
    assert "a title" in shown
    assert "times-1" in shown
    assert "\x1b[" in shown, "nothing was drawn over"
    assert "Traceback" not in shown


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _read_until(terminal: int, wanted: str) -> str:
    seen, deadline = "", time.monotonic() + LIMIT_S
    while wanted not in seen:
        assert time.monotonic() < deadline, seen
        ready, _, _ = select.select([terminal], [], [], 1.0)
        if ready:
            seen += os.read(terminal, 65536).decode("utf-8", "replace")
    return seen
