"""What a watch makes of a run that ended, or of which nothing is heard."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from contract.config import RunConfig
from contract.errors import ConnectionFailedError, RoundError
from storage.reader import Reader
from storage.records import RunRow
from storage.store import Store, open_store
from trunkline import watch
from trunkline.flower import Submission, SuperLinkAddress
from trunkline.live import Standing, read_standing
from trunkline.processes import Daemon, Supervisor
from trunkline.workplace import Workplace


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


# ---- a run on a SuperLink that says little ---------------------------------------------------------------------------

FLWR = """#!/bin/sh
echo "$1" >>"{folder}/calls"
case $1 in
    run) echo "Successfully started run 7" ;;
    log) cat "{folder}/log" ;;
    ls) exec cat "{folder}/answer" ;;
esac
test -e "{folder}/lost" || exec sleep 300
"""
MOST_LOOKS = 5000


class Flower:
    """A `flwr` whose streams stay open and silent, or end where they are `lost`; `ls` says what it was told to."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.folder = folder
        self.store = store
        self.logs = folder / "logs"
        self.streams: dict[int, Daemon] = {}
        folder.mkdir()
        (folder / "calls").touch()
        (folder / "log").write_text("the first line\nthe second line\n")
        (folder / "flwr").write_text(FLWR.format(folder=folder))
        (folder / "flwr").chmod(0o755)

    def says(self, status: str) -> None:
        (self.folder / "answer").write_text(f'{{"runs": [{{"status": "{status}", "status-details": "so it is"}}]}}')

    def calls(self, command: str) -> int:
        return (self.folder / "calls").read_text().split().count(command)

    def finish(self) -> None:
        if self.store.find_run("r1") is None:
            self.store.create_run("r1", "7", {}, "deployment", "f" * 64)
        self.store.finish_run("r1", "finished")

    def watch(self, at_each_look: Callable[[int], object] = lambda look: None) -> RunRow | None:
        """Run and watch it; fails the test where it is watched without end."""
        looks = itertools.count(1)

        def read(reader: Reader, flower_run_id: str) -> Standing | None:
            if (look := next(looks)) > MOST_LOOKS:
                pytest.fail("the run is watched without end")
            self.streams |= {daemon.process.pid: daemon for daemon in supervisor.daemons}
            at_each_look(look)
            return read_standing(reader, flower_run_id)

        environment = {**os.environ, "PATH": f"{self.folder}{os.pathsep}{os.environ['PATH']}"}
        with socket.create_server(("127.0.0.1", 0)) as server, pytest.MonkeyPatch.context() as patch:
            patch.setattr(watch, "read_standing", read)
            with Supervisor(self.logs, environment) as supervisor:
                address = SuperLinkAddress(f"127.0.0.1:{server.getsockname()[1]}")
                row = watch.run_to_end(Workplace(self.folder, supervisor), RunConfig(), address)
                # What was replaced is gone, be it as a zombie, while the watch goes on.
                assert [daemon.process.pid for daemon in supervisor.daemons] == list(self.streams)[-1:]
                assert not any(psutil.pid_exists(pid) for pid in list(self.streams)[:-1])
                return row


@pytest.fixture
def flower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flower]:
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path / "home"))
    for name, value_s in (("POLL_S", 0.01), ("RECONNECTION_WAIT_S", 0.0), ("UNSEEN_AFTER_S", 0.0)):
        monkeypatch.setattr(watch, name, value_s)
    for name in ("LEASE_SILENCE_S", "LOG_SILENCE_S"):
        monkeypatch.setattr(watch, name, 0.2)
    with closing(open_store()) as store:
        yield Flower(tmp_path / "flower", store)


@pytest.mark.parametrize("seen", [True, False], ids=["a run in SQL", "a run elsewhere"])
def test_a_superlink_that_is_gone_without_a_word_ends_the_watch(flower: Flower, seen: bool) -> None:
    if seen:
        flower.store.create_run("r1", "7", {}, "deployment", "f" * 64)
    with pytest.raises(ConnectionFailedError, match="lost the SuperLink at 127.0.0.1:.*, where run 7 may go on"):
        flower.watch()
    assert flower.calls("ls") == watch.RECONNECTIONS


def test_a_run_that_ended_while_its_log_was_silent_has_failed(flower: Flower) -> None:
    flower.store.create_run("r1", "7", {}, "deployment", "f" * 64)
    flower.says("finished:failed")
    with pytest.raises(RoundError, match="run r1 failed: its ServerApp ended without a word"):
        flower.watch()
    assert flower.store.get_run("r1").status == "failed"


def test_flower_is_not_asked_for_a_run_whose_driver_is_heard(flower: Flower, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LEASE_SILENCE_S", 0.0)
    flower.store.create_run("r1", "7", {}, "deployment", "f" * 64)
    row = flower.watch(lambda look: flower.finish() if look == 20 else flower.store.renew_lease("r1"))
    assert row is not None
    assert (row.status, flower.calls("ls")) == ("finished", 0)


def test_flower_is_not_asked_for_a_run_elsewhere_whose_log_goes_on(
    flower: Flower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LOG_SILENCE_S", 0.0)

    def go_on(look: int) -> None:
        with (flower.logs / "flwr-run.log").open("a") as log:
            log.write(f"line {look}\n")
        if look == 20:
            flower.finish()

    assert flower.watch(go_on) is not None
    assert flower.calls("ls") == 0


@pytest.mark.parametrize("lost", [True, False], ids=["streams that are lost", "streams that are silent"])
def test_a_run_that_goes_on_is_listened_to_by_one_stream_and_its_log_told_once(
    flower: Flower, capsys: pytest.CaptureFixture[str], lost: bool
) -> None:
    flower.says("running")
    if lost:
        (flower.folder / "lost").touch()
    full = []

    def end_after_the_fourth(look: int) -> None:
        if full:
            flower.finish()
        elif flower.calls("log") > 3 and (flower.logs / "flwr-log.log").read_text():
            full.append(look)

    row = flower.watch(end_after_the_fourth)
    assert row is not None
    assert row.status == "finished"
    assert len(flower.streams) > 4
    assert (flower.logs / "flwr-log.log").read_text().count("first") <= 1
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if "line" in line] == ["the first line", "the second line"]


def test_what_is_kept_of_a_log_to_tell_it_once_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "MOST_SHOWN", 3)
    printed = stream(tmp_path, "".join(f"line {number}\n" for number in range(9)))
    with closing(open_store(f"sqlite:///{tmp_path / 'x.db'}")) as store:
        place = Workplace(tmp_path, Supervisor(tmp_path))
        one = watch._Watch(place, store, SuperLinkAddress("127.0.0.1:1"), Submission("7", printed), ())
        one._show_log()
        printed.log_path.write_text(printed.log_path.read_text() + "line 8\nline 9\n")
        one._show_log()
    assert len(one.shown) == 3
    assert capsys.readouterr().err.splitlines() == [f"line {number}" for number in range(10)]
    printed.process.wait()
