"""Simulations one after the other, killed at random and resumed, until the time is up."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.clients.sites import write_texts
from tests.soak.family import Reading, carrying, kill, of_home, reading, those
from tests.soak.trunk import SoakTrunk
from trunkline.project import write_project

ROUNDS = 3
STUCK_S = 600.0
"""A run of which nothing is heard for so long is stuck: each of its waits is bounded by less."""
_LEFT_S = 60.0
_TRIES = 6
_SAMPLE_S = 2.0
_TRUNK_AWAY_S = 3.0
_KINDS = ("orchestrator", "client", "superlink", "ray", "command", "everything")
_SETTINGS = (
    "num-rounds={rounds} quorum=2 local-steps=2 max-length=16 lora-r=2 target-modules='q_proj' eval-fraction=0.0 "
    "per-device-train-batch-size=2 threads=1 trunk-wait-s=300 node-wait-s=300"
)
_PRIVATE = "dp='client' dp-noise-multiplier=4.0 trunk-adapter='frozen' metrics='off'"


@dataclass
class Told:
    """What came of all runs."""

    runs: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    resumes: int = 0
    faults: list[str] = field(default_factory=list)


@dataclass
class Simulations:
    """Runs of so many clients at one home, on one trunk, from one seed."""

    folder: Path
    model: Path
    trunk: SoakTrunk
    clients: int
    draw: random.Random
    ends_s: float
    say: Callable[[str], None]
    told: Told = field(default_factory=Told)
    orchestrators: dict[int, list[Reading]] = field(default_factory=dict)
    """By process, what each orchestrator held."""

    def __post_init__(self) -> None:
        self._began_s = time.monotonic()
        self.home = self.folder / "home"
        self.home.mkdir()
        self._project = self.folder / "project"
        write_project(self._project)
        self._log = self.folder / "runs.log"
        self._log.touch()
        self._over = threading.Event()
        threading.Thread(target=self._sample, daemon=True).start()

    @property
    def _trunk_may_die(self) -> bool:
        """In the first third only: what its memory does is read off the rest."""
        now_s = time.monotonic()
        return now_s < self._began_s + (self.ends_s - self._began_s) / 3

    def play(self) -> Told:
        while time.monotonic() < self.ends_s and not self.told.faults:
            self._run()
        self._over.set()
        return self.told

    # ---- one run, until it has finished --------------------------------------------------------------------------

    def _run(self) -> None:
        self.told.runs += 1
        data = self.folder / "data" / str(self.told.runs)
        data.mkdir(parents=True)
        for number in range(self.clients):
            write_texts(data / f"{number}.jsonl", 12, 1000 * self.told.runs + number)
        private = self.told.runs % 3 == 0
        where = f"model='{self.model}' data='{data}/{{partition}}.jsonl'"
        settings = " ".join((_SETTINGS.format(rounds=ROUNDS), where, _PRIVATE if private else ""))
        command = ["run", str(self._project), "--simulate", str(self.clients), "-c", settings]
        code, killed = self._life(command)
        unkilled = 0
        while code != 0 and not self.told.faults:
            unkilled = 0 if killed else unkilled + 1
            if unkilled >= _TRIES:
                self.told.faults.append(f"run {self.told.runs} failed {unkilled} times without being killed")
                return
            begun = self._run_was_written()
            self.told.resumes += begun
            resume = ["runs", "resume", "--last", "--simulate", str(self.clients)]
            code, killed = self._life(resume if begun else command)
        self.say(f"run {self.told.runs} finished; {dict(self.told.kills)}, {self.told.resumes} resumed")

    def _life(self, arguments: list[str]) -> tuple[int, bool]:
        """One command to its end: its exit code, and whether anything of it was killed."""
        began = self._log.stat().st_size
        environment = {**os.environ, "TRUNKLINE_HOME": str(self.home), "TRUNKLINE_DATABASE_URL": ""}
        with self._log.open("ab") as log:
            command = subprocess.Popen(
                [sys.executable, "-m", "trunkline", *arguments, "--trunk", self.trunk.address, "-o", "json"],
                cwd="/",
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        killed = False
        try:
            while command.poll() is None and not self.told.faults:
                if time.monotonic() < self.ends_s and self.draw.random() < 0.8:
                    killed |= self._kill_once(command, began)
                else:
                    self._wait(command, lambda: False)
        finally:
            if command.poll() is None:  # a fault, or an interrupt: what it started ends with it
                command.terminate()
            code = command.wait()
        self._require_nothing_left()
        return code, killed

    def _kill_once(self, command: subprocess.Popen[bytes], began: int) -> bool:
        """Something of the run, at a random moment of its start or of its rounds; whether it was there."""
        if self.draw.random() < 0.85:
            self._wait(command, lambda: self._asked(began))
        until_s = time.monotonic() + self.draw.uniform(0.0, 25.0)
        self._wait(command, lambda: time.monotonic() > until_s)
        if command.poll() is not None or time.monotonic() > self.ends_s:
            return False
        kinds = (*_KINDS, "trunk") if self._trunk_may_die else _KINDS
        kind = self.draw.choice(kinds)
        if not self._kill(kind, command):
            return False
        self.told.kills[kind] += 1
        self.say(f"killed: {kind}")
        return True

    def _kill(self, kind: str, command: subprocess.Popen[bytes]) -> bool:
        if kind == "trunk":
            self.trunk.kill()
            time.sleep(_TRUNK_AWAY_S)
            self.trunk.start()
            return True
        if kind == "command":
            command.send_signal(signal.SIGKILL)
            return True
        if kind == "everything":
            command.send_signal(signal.SIGKILL)
            with_trunk = self._trunk_may_die
            if with_trunk:
                self.trunk.kill()
            until_s = time.monotonic() + _LEFT_S
            while (left := of_home(self.home)) and time.monotonic() < until_s:
                for process in left:
                    kill(process)
                time.sleep(0.1)
            if with_trunk:
                self.trunk.start()
            return True
        found = those(self.home, kind)
        return bool(found) and kill(self.draw.choice(found))

    # ---- waiting and looking -------------------------------------------------------------------------------------

    def _wait(self, command: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
        """Until `ready` or the command's end; a fault where nothing is heard for STUCK_S."""
        size, heard_s = -1, time.monotonic()
        while command.poll() is None and not ready():
            if (now := self._log.stat().st_size) != size:
                size, heard_s = now, time.monotonic()
            if time.monotonic() - heard_s > STUCK_S:
                self.told.faults.append(f"run {self.told.runs} is stuck: nothing was heard for {STUCK_S:.0f} s")
                command.kill()
                return
            if (code := self.trunk.ended()) is not None:
                self.told.faults.append(f"the trunk ended by itself, with {code}")
                command.kill()
                return
            time.sleep(0.2)

    def _asked(self, began: int) -> bool:
        with self._log.open("rb") as log:
            log.seek(began)
            return b"clients asked" in log.read()

    def _run_was_written(self) -> bool:
        """Whether SQL knows of the run: one that was killed before that begins anew."""
        rows = self.ask("runs", "list")
        return bool(rows) and len(rows) >= self.told.runs

    def ask(self, *arguments: str) -> list[dict[str, Any]]:
        done = self.command(*arguments, "-o", "json")
        return list(json.loads(done.stdout)["data"]) if done.returncode == 0 else []

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "TRUNKLINE_HOME": str(self.home), "TRUNKLINE_DATABASE_URL": ""}
        command = [sys.executable, "-m", "trunkline", *arguments]
        return subprocess.run(
            command, cwd="/", env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    def _require_nothing_left(self) -> None:
        """What a command had started ends with it, however it ended."""
        until_s = time.monotonic() + _LEFT_S
        while left := of_home(self.home):
            if time.monotonic() > until_s:
                names = sorted({_name(process) for process in left})
                self.told.faults.append(f"{len(left)} processes outlive their command: {', '.join(names)[:300]}")
                for process in carrying(self.home):
                    kill(process)
                return
            time.sleep(0.2)

    def _sample(self) -> None:
        while not self._over.wait(_SAMPLE_S):
            for process in those(self.home, "orchestrator"):
                if (found := reading(process, time.monotonic())) is not None:
                    self.orchestrators.setdefault(process.pid, []).append(found)


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:80]
    except psutil.Error:
        return "gone"
