"""`trunkline run` for real: in a path with spaces, from another directory, two at once, interrupted, and deployed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from contract.config import RunConfig
from demo.settings import MODEL_DIR
from storage.store import open_reader
from trunkline.flower import flower_environment, start_superlink, start_supernode
from trunkline.processes import Supervisor
from trunkline.project import write_project
from trunkline.workplace import Workplace, start_trunk

LIMIT_S = 240
# Takes the checkout off the import path of whatever starts with it, be it installed or not: what is left of our code
# is what came in the bundle.
NO_CHECKOUT = """
import sys
from pathlib import Path
checkout = Path({checkout!r})
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != checkout]
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in str(finder)]
sys.path_hooks[:] = [hook for hook in sys.path_hooks if "__editable__" not in str(hook)]
"""


def of_home(home: Path) -> list[psutil.Process]:
    """Every process, zombies included, that was started for this home, the one that we started apart."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TRUNKLINE_HOME") == str(home) and process.ppid() != os.getpid():
                found.append(process)
        except psutil.Error:
            continue
    return found


def runs(process: psutil.Process) -> bool:
    """Whether it still runs; an ended one may wait as a zombie for whoever adopted it, this test's process perhaps."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} in vain"
        time.sleep(0.1)


def status(home: Path) -> tuple[str, str | None]:
    reader = open_reader(f"sqlite:///{home}/trunkline.db")
    try:
        run = reader.get_run("last")
        return run.status, run.reason
    finally:
        reader.close()


@pytest.mark.simulation
@pytest.mark.parametrize("number", [signal.SIGINT])
def test_two_runs_at_once_one_finishes_and_the_interrupted_one_leaves_nothing(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]], number: signal.Signals
) -> None:
    project = tmp_path / "a project"
    write_project(project)
    settings = ("-c", "num-rounds=1 local-steps=2", "-o", "json")
    ended = start("ended", "run", str(project), "--simulate", "2", *settings)
    kept = start("kept", "run", str(project), "--simulate", "2", *settings)
    log = tmp_path / "ended.log"
    wait_until(lambda: "round 1/1: 2 clients asked" in log.read_text(), "waited for the first round")
    family = of_home(tmp_path / "ended")
    assert any(process.name().startswith("raylet") for process in family), "Ray runs, so there is something to leave"

    ended.send_signal(number)
    assert ended.wait(30) == 130
    wait_until(lambda: not any(runs(process) for process in family), "waited for Ray's and Flower's processes")
    assert of_home(tmp_path / "ended") == []
    assert status(tmp_path / "ended") == ("stopped", "interrupted where it was started")

    out, _ = kept.communicate(timeout=LIMIT_S)
    said = (tmp_path / "kept.log").read_text()
    assert kept.returncode == 0, said
    result = json.loads(out)["data"]
    assert (result["status"], result["rounds"]) == ("finished", 1)
    assert (Path(result["adapter"]) / "adapter_model.safetensors").is_file()
    assert "round 1/1: 2/2 replied" in said
    assert f"{project}/data/client-{{partition}}.jsonl" in said, "the data's path is told"
    assert of_home(tmp_path / "kept") == []


@pytest.mark.deployment
def test_a_run_on_a_superlink_elsewhere_works_from_its_bundle_alone(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    project, sites, blocker = tmp_path / "project", tmp_path / "the sites", tmp_path / "blocker"
    write_project(project)
    shutil.copytree(MODEL_DIR, sites / "model")
    shutil.copytree(project / "data", sites / "data")
    blocker.mkdir()
    checkout = Path(__file__).resolve().parents[2]
    (blocker / "sitecustomize.py").write_text(NO_CHECKOUT.format(checkout=str(checkout)))
    without = {**os.environ, "PYTHONPATH": str(blocker)}
    assert subprocess.run([sys.executable, "-c", "import contract"], cwd="/", env=without, check=False).returncode
    work = Path("/tmp") / f"tl-{os.getpid()}"
    work.mkdir()
    away = {**flower_environment(work, 1), "PYTHONPATH": str(blocker), "TRUNKLINE_HOME": str(tmp_path / "server")}
    with Supervisor(work / "away", away) as elsewhere, Supervisor(work / "here") as here:
        trunk = start_trunk(Workplace(work, here), RunConfig(), str(sites / "model"))
        superlink = start_superlink(elsewhere, simulation=False)
        in_clear: dict[str, str | int | bool] = {"allow-secagg-off": True}
        for number in range(2):
            site = {"model": str(sites / "model"), "data": str(sites / "data" / f"client-{number}.jsonl")}
            start_supernode(elsewhere, superlink, f"site-{number}", {**site, **in_clear})
        settings = f"num-rounds=1 local-steps=2 eval-fraction=0.0 secagg='off' model='{sites / 'model'}'"
        where = ("--superlink", superlink.address, "--trunk", trunk.address(here))
        run = start("submitter", "run", str(project), *where, "-c", settings, "-o", "json")
        wait_until(lambda: "1 rounds, trunk at" in (tmp_path / "submitter.log").read_text(), "waited for the run's log")
        (stream,) = [child for child in psutil.Process(run.pid).children() if "flwr" in " ".join(child.cmdline())]
        stream.kill()
        assert run.wait(LIMIT_S) == 0, (tmp_path / "submitter.log").read_text()
        logs = "".join(path.read_text(errors="replace") for path in (work / "away").glob("*.log"))
    shutil.rmtree(work)
    said = (tmp_path / "submitter.log").read_text()
    assert "each SuperNode reads what its own node config names" in said
    for line in ("1 rounds, trunk at", "round 1/1: 2/2 clients"):
        assert said.count(line) == 1, "the ServerApp's log is shown, once, where SQL is out of sight; its stream broke"
    assert str(checkout) not in logs
    assert status(tmp_path / "server") == ("finished", None)
    (adapter,) = (tmp_path / "server" / "runs").glob("*/adapter/adapter_model.safetensors")
    assert adapter.is_file()
