"""A trunk that does not get as far as serving: told to end while it loads, or with nowhere to announce itself."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server_trunk.cli import app
from tests.server_trunk.test_serving import environment


def serve_with(load: str, model_dir: Path, *arguments: str) -> subprocess.Popen[str]:
    """`trunk serve` in a process of its own, in which the body `load` runs in place of the model's load."""
    code = f"import os, sys, time\nfrom server_trunk import server\nreal = server.Engine\ndef load(*a, **k):\n{load}\n"
    code += "server.Engine = load\nfrom server_trunk.cli import app\napp()"
    command = [sys.executable, "-c", code, "serve", "--model", str(model_dir), "--listen", "127.0.0.1:0", *arguments]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_load_ends_the_trunk_at_once(
    model_dir: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    load = "  print('in the load', file=sys.stderr, flush=True)\n  time.sleep(45)"
    with serve_with(load, model_dir, "--state-dir", str(tmp_path / "state")) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert "in the load\n" in lines
        process.send_signal(signum)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert out == ""
    assert err == "told to end before the trunk was ready\n"


def test_an_announce_file_that_cannot_be_written_is_told_before_the_load(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for announce, reason in (
        (tmp_path / "none" / "address", f"there is no folder {tmp_path}/none"),
        (tmp_path / "folder", "is a folder; it must be a file"),
    ):
        arguments = ["--model", str(tmp_path / "none"), "--listen", "127.0.0.1:0", "--announce-file", str(announce)]
        result = CliRunner().invoke(app, ["serve", *arguments, "--state-dir", str(tmp_path / "state")])
        assert result.exit_code == 2
        assert result.stderr.splitlines()[1].startswith(f"error: announce-file {announce}")
        assert result.stderr.splitlines()[1].endswith(reason)
        assert len(result.stderr.splitlines()) == 2


def test_an_announce_folder_that_goes_during_the_load_is_one_line(model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    load = f"  os.rmdir({str(folder)!r})\n  return real(*a, **k)"
    arguments = ("--announce-file", str(folder / "address"), "--state-dir", str(tmp_path / "state"))
    with serve_with(load, model_dir, *arguments) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == ""
    assert err.splitlines()[-1] == f"error: announce-file {folder}/address cannot be written: No such file or directory"
    assert "Traceback" not in err
