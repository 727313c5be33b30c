"""All attacks, one after the other, on one live trunk with little memory, while two honest clients train.

Measured: the trunk's resident memory, what it has open, and the honest clients' steps; judged: that memory stays in
its budget, that the honest get the bits that they had before, that nothing is admitted that should not be, and that
the trunk is afterwards what it was.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc

from contract import trunk_pb2 as pb
from contract.trunk_pb2_grpc import TrunkStub
from tests.hostile.caller import Target
from tests.hostile.conversations import FUZZED_RUN, Served
from tests.hostile.stage import HIDDEN, MAX_TOKENS, put_bases, save_model
from tests.hostile.target_trunk import (
    BUDGET_MIB,
    MAX_SESSIONS,
    REPOSITORY,
    SETTLE_S,
    Reading,
    running,
    tracebacks,
)
from tests.hostile.wire import fuzz
from tests.pki import Pki

CONSTANT_MIB = 192
"""What the trunk may take beside its budget: gRPC's buffers of a thousand streams, what glibc keeps, code that is
loaded at its first use."""
CLIENTS = ("ada", "bob")
RUN = "honest"
ABANDONED = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
"""Clients that hold what they can, and how each is left then."""
FUZZED_FRAMES = 5000
_PATIENCE_S = 120.0


@dataclass
class Phase:
    """What was seen while one attack went on, or none."""

    name: str
    scale: str
    seconds: float
    peak_mib: float = 0.0
    step_ms: float = 0.0
    slowest_ms: float = 0.0
    rounds: int = 0
    lost: int = 0
    most_sessions: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


class Honest:
    """The honest clients' processes, and what they have told."""

    def __init__(self, target_file: Path) -> None:
        self.told: dict[str, list[dict[str, Any]]] = {client: [] for client in CLIENTS}
        self._processes = {
            client: subprocess.Popen(
                [sys.executable, "-m", "tests.hostile.honest", str(target_file), client, RUN],
                cwd=REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for client in CLIENTS
        }
        self._readers = [threading.Thread(target=self._read, args=(client,), daemon=True) for client in CLIENTS]
        for reader in self._readers:
            reader.start()

    def rounds(self, since_s: float, until_s: float) -> list[dict[str, Any]]:
        """Those that ended within, of both clients."""
        return [one for told in self.told.values() for one in list(told) if since_s <= one["ended_s"] < until_s]

    def finished(self) -> int:
        """Rounds that both have finished."""
        return min(len(told) for told in self.told.values())

    def end(self) -> None:
        """Let them finish the round that they are in."""
        for process in self._processes.values():
            if process.stdin is not None:
                process.stdin.close()
        for process in self._processes.values():
            process.wait(_PATIENCE_S)
        for reader in self._readers:
            reader.join()

    def kill(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()

    def _read(self, client: str) -> None:
        out = self._processes[client].stdout
        for line in out or ():
            self.told[client].append(json.loads(line))


@dataclass
class Storm:
    """One trunk under attack; a `locked` one takes callers by certificate, and sessions by ticket, alone."""

    folder: Path
    seed: int
    seconds: float
    scale: float
    say: Callable[[str], None]
    locked: bool = False
    phases: list[Phase] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def run(self, attacks: Sequence[str]) -> dict[str, Any]:
        """Play them; answers what was seen. `faults` is empty where all is as it must be."""
        with ExitStack() as stack:
            model = save_model(self.folder / "model")
            pki = Pki.made(self.folder / "pki") if self.locked else None
            self.bases = put_bases(model, self.folder / "state")
            self.trunk = stack.enter_context(running(self.folder, model, pki))
            loras, bases = self.bases
            told = self.trunk.described()
            keys = "" if pki is None else str(pki.folder)
            self.target = Target(self.trunk.address, HIDDEN, MAX_TOKENS, bases[0], loras[0], told.model, keys)
            self.target_file = self.folder / "target.json"
            self.target.write(self.target_file)
            self.honest = Honest(self.target_file)
            stack.callback(self.honest.kill)
            self._wait_for(lambda: self.honest.finished() >= 2, "the honest clients' first rounds")
            self._phase("nobody", "", lambda: self._idle(max(self.seconds, 3.0)))
            base = self.trunk.reading()
            for name in attacks:
                scale = f"x {self.scale:g}" if self.scale < 1 else "full"
                self._phase(name, scale, lambda name=name: self._attack(name))  # type: ignore[misc]
            self._phase("nobody again", "", lambda: self._idle(max(self.seconds, 3.0)))
            self.honest.end()
            after = self._settled(base)
            self._judge_honest()
            self._judge_stored()
            peak = max(phase.peak_mib for phase in self.phases)
            if peak > base.rss_mib + BUDGET_MIB + CONSTANT_MIB:
                self.faults.append(
                    f"the trunk took {peak:.0f} MiB: over its base of {base.rss_mib:.0f}, a budget of {BUDGET_MIB} and "
                    f"{CONSTANT_MIB}"
                )
            said = self.trunk.log.read_text(errors="replace")
            self.faults += [f"the trunk's log has a traceback: {line}" for line in tracebacks(said)]
        return {
            "seed": self.seed,
            "budget_mib": BUDGET_MIB,
            "constant_mib": CONSTANT_MIB,
            "base": asdict(base),
            "after": asdict(after),
            "peak_mib": peak,
            "honest_rounds": {client: len(told) for client, told in self.honest.told.items()},
            "phases": [asdict(phase) for phase in self.phases],
            "faults": self.faults,
        }

    # ---- phases --------------------------------------------------------------------------------------------------

    def _phase(self, name: str, scale: str, work: Callable[[], dict[str, Any]]) -> None:
        began_s, began = time.time(), self.honest.finished()
        self.trunk.peak_mib()
        told = work()
        # Each honest client comes to the end of a round that it trained meanwhile.
        self._wait_for(lambda: self.honest.finished() > began, f"a round of the honest clients under {name}")
        ended_s = time.time()
        rounds = self.honest.rounds(began_s, ended_s)
        steps = [one for told_ in rounds for one in told_["step_s"]]
        phase = Phase(
            name,
            scale,
            ended_s - began_s,
            self.trunk.peak_mib(),
            1000 * statistics.median(steps) if steps else 0.0,
            1000 * max(steps, default=0.0),
            len(rounds),
            sum(len(one["lost"]) for one in rounds),
            told.get("most_sessions", 0),
            told.get("ends", {}),
            told.get("faults", []),
        )
        self.phases.append(phase)
        self.faults += [f"{name}: {fault}" for fault in phase.faults]
        if phase.most_sessions > MAX_SESSIONS:
            self.faults.append(f"{name}: {phase.most_sessions} sessions were open, {MAX_SESSIONS} may be")
        self.say(
            f"{name}: peak {phase.peak_mib:.0f} MiB, {phase.rounds} honest rounds, a step {phase.step_ms:.0f} ms, "
            f"slowest {phase.slowest_ms:.0f} ms, {phase.lost} lost; {phase.ends}"
        )

    def _idle(self, seconds: float) -> dict[str, Any]:
        time.sleep(seconds)
        return {}

    def _attack(self, name: str) -> dict[str, Any]:
        if name in ABANDONED:
            return self._abandon(ABANDONED[name])
        if name == "fuzz":
            return self._fuzz()
        process = self._attacker(name, self.seconds)
        most = self._watch(process, self.seconds + _PATIENCE_S)
        out, _ = process.communicate(timeout=_PATIENCE_S)
        if process.returncode != 0:
            raise RuntimeError(f"the attack {name} itself failed, with {process.returncode}")
        return {**json.loads(out), "most_sessions": most}

    def _abandon(self, how: signal.Signals) -> dict[str, Any]:
        """Clients that hold what they can are killed in the middle of it, or fall silent with their connections up."""
        ends, most = 0, 0
        until_s = time.monotonic() + self.seconds
        while time.monotonic() < until_s or not ends:
            process = self._attacker("hoard", 600.0)
            most = max(most, self._watch(process, 2.0))
            process.send_signal(how)
            if how == signal.SIGSTOP:
                most = max(most, self._watch(process, max(2.0, self.seconds - 2.0)))
            process.kill()
            process.wait()
            ends += 1
        return {"ends": {how.name: ends}, "most_sessions": most}

    def _fuzz(self) -> dict[str, Any]:
        """The fuzzed conversations over the wire; some thousand frames."""
        served = Served(self.target.model, HIDDEN, *self.bases)
        frames = round(FUZZED_FRAMES * self.scale)
        outcomes, sent = fuzz(self.target, served, self.seed, frames, self.seconds + _PATIENCE_S)
        return {"ends": {**outcomes.ends, "frames": sent}, "faults": outcomes.faults}

    def _attacker(self, name: str, seconds: float) -> subprocess.Popen[str]:
        arguments = (name, self.target_file, self.seed, seconds, self.scale)
        command = [sys.executable, "-m", "tests.hostile.attacker", *map(str, arguments)]
        return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)

    def _watch(self, process: subprocess.Popen[str], seconds: float) -> int:
        """The most sessions that the trunk had open until the process ended, or the time was up.

        Asking is what an honest newcomer does, so that it must be answered.
        """
        most, until_s = 0, time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < until_s:
            try:
                most = max(most, self.trunk.described().open_sessions)
            except grpc.RpcError as error:
                call: Any = error
                self.faults.append(f"Describe was refused under attack: {call.code().name}: {call.details()}")
            time.sleep(0.2)
        return most

    # ---- judging -------------------------------------------------------------------------------------------------

    def _settled(self, base: Reading) -> Reading:
        """What the trunk has once all are gone; a fault where that is more than before."""
        until_s = time.monotonic() + SETTLE_S
        while True:
            now, described = self.trunk.reading(), self.trunk.described()
            wrong = []
            if described.open_sessions:
                wrong.append(f"{described.open_sessions} sessions are open")
            if now.files > base.files + 8:
                wrong.append(f"{now.files} files are open, {base.files} were before")
            if now.threads > base.threads + 8:
                wrong.append(f"{now.threads} threads run, {base.threads} did before")
            if spilled := self.trunk.spilled():
                wrong.append(f"{len(spilled)} files are left of what was put aside")
            if not wrong or time.monotonic() > until_s:
                self.faults += wrong
                return now
            time.sleep(0.5)

    def _judge_honest(self) -> None:
        for client, told in self.honest.told.items():
            rounds = [one for one in told if one["adapter"]]
            first = rounds[0]
            for one in rounds:
                if (one["adapter"], one["digest"]) != (first["adapter"], first["digest"]):
                    self.faults.append(f"{client}: round {one['round']} came to other bits than round 1")
        self._judge_commit()

    def _judge_commit(self) -> None:
        """The last round that both contributed to commits to what any other would: their mean, and nobody else's."""
        last = self.honest.finished() - 1
        base_sha256 = self.target.base_sha256
        key = pb.RoundId(run=RUN, round=last, attempt=1)
        with self.trunk.channel() as channel:
            stub = TrunkStub(channel)
            request = pb.CommitRoundRequest(round=key, base_sha256=base_sha256, survivors=CLIENTS)
            reply = stub.CommitRound(request, timeout=30)
            if reply.trained_tokens != 200:
                self.faults.append(f"round {last} commits {reply.trained_tokens} tokens, 200 were trained")
            strangers = pb.CommitRoundRequest(
                round=key, base_sha256=base_sha256, survivors=[*CLIENTS, "hostile"], partial=True
            )
            if list(stub.CommitRound(strangers, timeout=30).clients) != list(CLIENTS):
                self.faults.append(f"round {last} has contributions of others than {CLIENTS}")

    def _judge_stored(self) -> None:
        """Only what the honest contributed, and adapters under their own hashes."""
        for path in self.trunk.state_dir.glob("**/*.safetensors"):
            if "spill-" not in str(path) and sha256(path.read_bytes()).hexdigest() != path.stem:
                self.faults.append(f"{path.name} holds other bytes than its name says")
        kept = {path.parts[-4] for path in self.trunk.state_dir.glob("rounds/*/*/*/*.json")}
        kept |= {path.parts[-4] for path in self.trunk.state_dir.glob("candidates/*/*/*/*.json")}
        if nobodys := kept - {RUN, FUZZED_RUN}:
            self.faults.append(f"contributions or commits are kept of {len(nobodys)} runs that nobody trained")
        partial = list(self.trunk.state_dir.glob("**/.partial-*"))
        if partial:
            self.faults.append(f"{len(partial)} half uploads are left")

    def _wait_for(self, ready: Callable[[], bool], what: str) -> None:
        until_s = time.monotonic() + _PATIENCE_S
        while not ready():
            if time.monotonic() > until_s:
                raise RuntimeError(f"waited {_PATIENCE_S:.0f} s for {what} in vain")
            if self.trunk.process.poll() is not None:
                raise RuntimeError(f"the trunk ended with {self.trunk.process.returncode} under {what}")
            time.sleep(0.05)
