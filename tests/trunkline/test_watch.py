"""What a watch makes of a run that ended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trunkline import watch
from trunkline.processes import Daemon


def stream(folder: Path, log: str, code: str = "") -> Daemon:
    path = folder / "flwr-run.log"
    path.write_text(log)
    return Daemon("flwr-run", subprocess.Popen([sys.executable, "-c", code]), path)


def test_a_crash_of_the_simulation_engine_is_told_from_a_stop(tmp_path: Path) -> None:
    told = "\x1b[91mERROR \x1b[0m:     An exception occured!! Timed out waiting for file gcs_server_port\nTraceback\n"
    crashed = stream(tmp_path, f"INFO: Starting Flower Simulation\n{told}")
    expected = "Flower's simulation engine crashed: Timed out waiting for file gcs_server_port"
    assert watch.simulation_crash(crashed) == expected
    crashed.process.wait()
    stopped = stream(tmp_path, "INFO: Starting Flower Simulation\n")
    assert watch.simulation_crash(stopped) is None
    stopped.process.wait()


def test_the_wait_for_the_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "CRASH_LOG_WAIT_S", 0.3)
    silent = stream(tmp_path, "", "import time; time.sleep(60)")
    assert watch.simulation_crash(silent) is None
    silent.process.kill()
    silent.process.wait()


def test_a_slow_database_is_looked_at_less_often() -> None:
    assert watch.pause_s(0.001) == watch.POLL_S
    assert watch.pause_s(0.8) == pytest.approx(3.2)
    assert watch.pause_s(60) == watch.LONGEST_POLL_S
