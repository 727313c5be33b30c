"""`trunkline runs resume` for real: all of a run is killed, or its trunk alone, and the adapters come out equal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from contract.config import RunConfig
from demo.settings import MODEL_DIR
from storage.store import open_reader
from tests.trunkline.test_run import LIMIT_S, of_home, runs, status, wait_until
from trunkline.ports import reserve_port
from trunkline.processes import Daemon, Supervisor
from trunkline.project import write_project

Start = Callable[..., "subprocess.Popen[str]"]
STEPS = 24  # rounds must be long enough to be killed in the middle of, on a busy machine too
SETTINGS = f"num-rounds=3 local-steps={STEPS} deterministic=true eval-fraction=0.0 threads=1"
WAY = ("--simulate", "2", "-o", "json")


def adapters(home: Path) -> list[tuple[int, str, str]]:
    """The versions that the home's newest run has committed."""
    with closing(open_reader(f"sqlite:///{home}/trunkline.db")) as reader:
        rows = reader.adapter_versions(reader.get_run("last").run_id)
        return [(row.number, row.client_sha256, row.trunk_sha256) for row in rows]


def attempts(home: Path) -> list[tuple[int, int, str]]:
    with closing(open_reader(f"sqlite:///{home}/trunkline.db")) as reader:
        return [(row.number, row.attempt, row.status) for row in reader.rounds(reader.get_run("last").run_id)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = tmp_path_factory.mktemp("resume") / "project"
    write_project(project)
    return project


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, project: Path) -> list[tuple[int, str, str]]:
    """What the run comes to when nobody kills anything."""
    home = tmp_path_factory.mktemp("whole")
    done = subprocess.run(
        [sys.executable, "-m", "trunkline", "run", str(project), *WAY, "-c", SETTINGS],
        cwd="/",
        env={**os.environ, "TRUNKLINE_HOME": str(home), "TRUNKLINE_DATABASE_URL": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return adapters(home)


def steps_in(home: Path, number: int) -> int:
    """How many optimiser steps the trunk has seen of a round, as SQL has it."""
    with closing(open_reader(f"sqlite:///{home}/trunkline.db")) as reader:
        rounds = [row.steps for row in reader.rounds(reader.get_run("last").run_id) if row.number == number]
    return max(rounds, default=0)


def training_in(log: Path, number: int) -> Callable[[], bool]:
    return lambda: f"round {number}/3: 2 clients asked" in log.read_text()


@pytest.mark.simulation
@pytest.mark.timeout(3 * LIMIT_S)
def test_a_run_of_which_everything_was_killed_goes_on_and_comes_to_equal_adapters(
    tmp_path: Path, project: Path, start: Start, uninterrupted: list[tuple[int, str, str]]
) -> None:
    home, log = tmp_path / "killed", tmp_path / "killed.log"
    run = start("killed", "run", str(project), *WAY, "-c", SETTINGS)
    wait_until(training_in(log, 2), "waited for the second round")
    family = of_home(home)
    run.send_signal(signal.SIGKILL)
    run.wait(10)
    wait_until(lambda: not any(runs(process) for process in family), "waited for what the killed command had started")
    assert status(home) == ("running", None)
    assert adapters(home) == uninterrupted[:2]

    resumed = start("killed", "runs", "resume", "--last", "-o", "json")
    out, _ = resumed.communicate(timeout=LIMIT_S)
    said = log.read_text()
    assert resumed.returncode == 0, said
    assert "1 of 3 rounds are committed; it goes on from there" in said
    assert json.loads(out)["data"]["rounds"] == 3
    assert adapters(home) == uninterrupted
    assert attempts(home) == [(1, 1, "committed"), (2, 1, "aborted"), (2, 2, "committed"), (3, 1, "committed")], said
    assert of_home(home) == []


@pytest.mark.simulation
@pytest.mark.timeout(3 * LIMIT_S)
def test_a_trunk_that_is_killed_and_comes_back_costs_its_clients_a_replay_and_no_round(
    tmp_path: Path, project: Path, start: Start, uninterrupted: list[tuple[int, str, str]]
) -> None:
    home, log, port = tmp_path / "alone", tmp_path / "alone.log", reserve_port()
    with Supervisor(tmp_path / "trunks") as supervisor:
        first = serve(supervisor, tmp_path, port, "first")
        run = start("alone", "run", str(project), *WAY, "--trunk", f"127.0.0.1:{port}", "-c", SETTINGS)
        wait_until(training_in(log, 2), "waited for the second round")
        wait_until(lambda: steps_in(home, 2) > 0, "waited for its first steps")
        first.process.send_signal(signal.SIGKILL)
        first.process.wait(10)
        serve(supervisor, tmp_path, port, "second")
        assert run.wait(LIMIT_S) == 0, log.read_text()
    assert adapters(home) == uninterrupted
    assert attempts(home) == [(number, 1, "committed") for number in (1, 2, 3)], log.read_text()
    assert all(steps_in(home, number) >= 2 * STEPS for number in (1, 2, 3))


def serve(supervisor: Supervisor, folder: Path, port: int, name: str) -> Daemon:
    """A trunk at `port` that keeps its state in one place, ready to be asked."""
    announcement = folder / f"{name}-address"
    config = RunConfig()
    trunk = supervisor.start(
        name,
        [
            *(sys.executable, "-m", "trunkline", "trunk", "serve", "--model", str(MODEL_DIR)),
            *("--head-layers", str(config.head_layers), "--tail-layers", str(config.tail_layers)),
            *("--listen", f"127.0.0.1:{port}", "--announce-file", str(announcement)),
            *("--state-dir", str(folder / "state"), "--batch-tokens", "512"),
        ],
    )
    supervisor.wait_for(announcement.exists, trunk, "the trunk", LIMIT_S)
    return trunk
