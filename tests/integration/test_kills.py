"""Every program of a real deployment killed, at moments that a printed seed draws; what a user does then is done.

The run must end in the adapters of one that nobody disturbed. Those are computed apart, in clear, within the test.
"""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from storage.artifacts import ArtifactStore
from storage.reader import Reader
from storage.records import RoundRow, RunRow
from storage.store import open_reader, open_store
from tests.clients.sites import Site, save_site_model, write_texts
from tests.faults.oracle import Oracle
from tests.orchestrator.conftest import inside_a_flower_task
from trunkline import flower
from trunkline.flower import LOOPBACK, START_LIMIT_S, SuperLinkAddress, flower_environment, start_supernode
from trunkline.ports import reserve_port
from trunkline.processes import Daemon, Supervisor
from trunkline.project import write_project

SITES, ROUNDS = 3, 3
LIMIT_S = 600.0
SETTINGS = (
    f"num-rounds={ROUNDS} quorum={SITES} deterministic=true threads=1 eval-fraction=0.0 "
    "local-steps=20 per-device-train-batch-size=2 max-length=16 lora-r=4 secagg-aborts=20"
)
PHASES = ("training", "confirming", "unmasking")
pytestmark = [pytest.mark.killing, pytest.mark.deployment, pytest.mark.timeout(3 * LIMIT_S)]


@dataclass
class Deployment:
    """A SuperLink, its sites, a trunk, and the command that waits for the run; `kills` counts by program."""

    folder: Path
    supervisor: Supervisor
    draw: random.Random
    model: Path
    superlink: SuperLinkAddress
    trunk_port: int
    running: dict[str, Daemon] = field(default_factory=dict)
    kills: Counter[str] = field(default_factory=Counter)
    began_s: float = field(default_factory=time.monotonic)
    dead: tuple[int, int] = (0, 0)
    """Round and attempt that no orchestrator plays any more, whatever SQL still says of it."""

    @property
    def trunk(self) -> str:
        return f"{LOOPBACK}:{self.trunk_port}"

    # ---- what a service manager does ---------------------------------------------------------------------------------

    def start_superlink(self) -> None:
        port = self.superlink.address.rpartition(":")[2]
        argv = ["flower-superlink", "--insecure", "--disable-runtime-dependency-installation"]
        argv += ["--host", LOOPBACK, "--port", port, "--database", str(self.folder / "superlink.db")]
        home = str(self.folder / "superlink-home")
        superlink = self.supervisor.start("superlink", argv, {"FLWR_HOME": home})
        self.running["SuperLink"] = superlink
        # Who resumes at once, where the lease has run out meanwhile, is refused by a SuperLink that only starts.
        self.supervisor.wait_for(
            lambda: flower._healthy(LOOPBACK, int(port)), superlink, "the SuperLink", START_LIMIT_S
        )

    def start_trunk(self) -> None:
        announcement = self.folder / "trunk-address"
        announcement.unlink(missing_ok=True)
        argv = [sys.executable, "-m", "trunkline", "trunk", "serve", "--model", str(self.model)]
        argv += ["--head-layers", "1", "--tail-layers", "1", "--listen", self.trunk, "--threads", "1"]
        argv += ["--state-dir", str(self.folder / "trunk"), "--announce-file", str(announcement)]
        trunk = self.supervisor.start("trunk", [*argv, "--batch-tokens", "512"])
        self.running["trunk"] = trunk
        self.supervisor.wait_for(announcement.exists, trunk, "the trunk", START_LIMIT_S)

    def start_site(self, number: int) -> None:
        self.running[f"SuperNode {number}"] = start_supernode(
            self.supervisor, self.superlink, f"site-{number}", dict(self.site(number).node_config)
        )

    def start_all(self) -> None:
        self.start_superlink()
        for number in range(SITES):
            self.start_site(number)
        self.start_trunk()

    def site(self, number: int) -> Site:
        texts = self.folder / f"{number}.jsonl"
        if not texts.exists():
            write_texts(texts, 40, number)
        told: dict[str, str | int | bool] = {
            "model": str(self.model),
            "data": str(texts),
            "name": f"site-{number}",
            "state-dir": str(self.folder / f"state-{number}"),
            "trunk-address": self.trunk,
            "secagg-min-members": SITES,
            "allow-deterministic": True,
        }
        return Site(number, told)

    # ---- what a user does --------------------------------------------------------------------------------------------

    def command(self, *arguments: str) -> None:
        argv = [sys.executable, "-m", "trunkline", *arguments, "--superlink", self.superlink.address]
        self.running["command"] = self.supervisor.start("command", argv)

    def resume(self) -> None:
        """As a person would who sees that nothing goes on: end what waits for it, and resume."""
        waiting = self.running["command"].process
        waiting.terminate()
        waiting.wait(60)
        self.command_resume()

    def command_resume(self) -> None:
        with self.reader() as reader:
            self.dead = max((row.number, row.attempt) for row in reader.rounds(reader.get_run("last").run_id))
        self.command("runs", "resume", "--last")

    # ---- what happens to it ------------------------------------------------------------------------------------------

    def kill(self, name: str) -> None:
        """SIGKILL for one program; a SuperNode goes with the ClientApps that it started."""
        process = self.running[name].process
        if name.startswith("SuperNode"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()
        self.killed(name.split()[0])

    def kill_apps(self, program: str) -> bool:
        """SIGKILL for the newest process of Flower's `program`, where one runs."""
        found = [one for one in self.supervisor.family() if program in _command_line(one)]
        if not found:
            return False
        max(found, key=lambda one: one.create_time()).kill()
        self.killed(program)
        return True

    def runs(self, program: str) -> bool:
        """Whether a process of Flower's `program` is there."""
        return any(program in _command_line(one) for one in self.supervisor.family())

    def kill_everything(self) -> None:
        for process in self.supervisor.family():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        for name in self.running:
            self.running[name].process.wait()
            self.killed(name.split()[0])
        self.until(lambda: not self.supervisor.family(), "the end of all that was killed")

    def killed(self, program: str) -> None:
        self.kills[program] += 1
        self.say(f"killed {program}")

    def say(self, what: str) -> None:
        sys.stdout.write(f"{time.monotonic() - self.began_s:6.1f} s  {what}\n")
        sys.stdout.flush()

    # ---- how it goes -------------------------------------------------------------------------------------------------

    def until(self, happens: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not happens():
            assert time.monotonic() < deadline, (what, self.running["command"].last_lines(40))
            time.sleep(0.05)

    def until_round(self, number: int, wanted: Callable[[RoundRow], bool]) -> RoundRow:
        """The newest attempt at a round, once it is as `wanted`, or committed before that was seen."""
        found: list[RoundRow] = []

        def reached() -> bool:
            assert self.running["command"].alive(), self.running["command"].last_lines(40)
            with self.reader() as reader:
                runs = reader.list_runs(1)
                rows = [row for row in reader.rounds(runs[0].run_id) if row.number == number] if runs else []
            open_now = [row for row in rows[-1:] if row.status == "open" and (number, row.attempt) > self.dead]
            found[:] = [row for row in rows if row.status == "committed"] + [row for row in open_now if wanted(row)]
            return bool(found)

        self.until(reached, f"round {number}")
        self.say(f"round {number}, attempt {found[0].attempt}: {found[0].phase}")
        return found[0]

    def until_drawn_moment(self, number: int) -> None:
        """Some moment of a round."""
        phase = self.draw.choice(PHASES)
        self.until_round(number, lambda row: row.phase == phase)
        time.sleep(self.draw.uniform(0.0, 2.0))

    def reader(self) -> closing[Reader]:
        return closing(open_reader())


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture
def deployment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deployment]:
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TRUNKLINE_DATABASE_URL", raising=False)
    environment = {**flower_environment(tmp_path, threads=1), "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    seed = int(os.environ.get("TRUNKLINE_FAULT_SEED", secrets.randbits(32)))
    sys.stdout.write(f"\nTRUNKLINE_FAULT_SEED={seed}\n")
    address = SuperLinkAddress(f"{LOOPBACK}:{reserve_port()}")
    open_store().close()
    # Flower's programs end by SIGINT when who started them is gone: one that ignored it would outlive its SuperLink.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Supervisor(tmp_path / "logs", environment) as supervisor:
        model = save_site_model(tmp_path / "model")
        yield Deployment(tmp_path, supervisor, random.Random(seed), model, address, reserve_port())


def test_a_run_whose_every_program_is_killed_ends_in_the_adapters_of_one_that_nobody_disturbed(
    deployment: Deployment, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    write_project(project)
    deployment.start_all()
    where = f"model='{deployment.model}' trunk-address='{deployment.trunk}'"
    deployment.command("run", str(project), "-c", f"{SETTINGS} {where}")

    # A trunk alone costs its clients a replay, and nobody does anything but start it again.
    deployment.until_round(1, lambda row: row.steps > 0)
    deployment.kill("trunk")
    deployment.start_trunk()

    # Sites and orchestrator at once: the SuperNode frees itself of its dead ClientApp while the lease runs out.
    deployment.until_drawn_moment(1)
    deployment.until(lambda: deployment.kill_apps("flwr-clientapp"), "a ClientApp")
    deployment.until(lambda: deployment.kill_apps("flwr-serverapp"), "the ServerApp")
    deployment.resume()

    deployment.until_drawn_moment(2)
    gone = deployment.draw.randrange(SITES)
    deployment.kill("SuperLink")
    deployment.kill(f"SuperNode {gone}")
    deployment.until(lambda: not deployment.runs("flwr-serverapp"), "Flower's end of a ServerApp without a SuperLink")
    deployment.start_superlink()
    deployment.start_site(gone)
    deployment.resume()

    deployment.until_drawn_moment(2)
    deployment.kill_everything()
    deployment.start_all()
    deployment.command_resume()

    deployment.until(lambda: not deployment.running["command"].alive(), "the end of the run")
    assert deployment.running["command"].process.wait() == 0, deployment.running["command"].last_lines(40)
    total = sum(deployment.kills.values())
    deployment.say(f"{total} kills through Flower: {json.dumps(deployment.kills)}")
    assert total >= 5
    check(deployment)


def check(deployment: Deployment) -> None:
    """All rounds are committed, each over all sites, and each came to what they train in clear."""
    with deployment.reader() as reader:
        run = reader.get_run("last")
        assert (run.status, run.committed_rounds) == ("finished", ROUNDS), run.reason
        assert over_all_sites(reader, run)
        artifacts = ArtifactStore(Path(os.environ["TRUNKLINE_HOME"]) / "artifacts")
        sites = {str(node): deployment.site(number) for number in range(SITES) for node in nodes_of(deployment, number)}
        with inside_a_flower_task():
            oracle = Oracle(reader, artifacts, sites, deployment.trunk, deployment.folder / "memory")
            assert oracle.faults(run) == []


def over_all_sites(reader: Reader, run: RunRow) -> bool:
    committed = [row for row in reader.rounds(run.run_id) if row.status == "committed"]
    parts = [
        [part.status for part in reader.participations(run.run_id, row.number) if part.attempt == row.attempt]
        for row in committed
    ]
    return parts == [["trained"] * SITES] * ROUNDS


def nodes_of(deployment: Deployment, number: int) -> list[int]:
    """Flower's ids of a site, one for each start of its SuperNode, as its log tells them."""
    log = deployment.running[f"SuperNode {number}"].log_path.read_text()
    return [int(found) for found in re.findall(r"SuperNode ID: (\d+)", log)]
