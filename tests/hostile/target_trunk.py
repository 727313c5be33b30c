"""The real trunk under attack: its process, sampled, in the clear for whoever comes, or by TLS and ticket alone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil

from contract import trunk_pb2 as pb
from contract.identity import public_key_text
from contract.tls import open_channel
from contract.trunk_pb2_grpc import TrunkStub
from tests.contract.ticket_cases import SIGNER_KEY
from tests.hostile.stage import MAX_TOKENS
from tests.pki import Pki

MIB = 1 << 20
BUDGET_MIB = 64
MAX_SESSIONS = 16
SETTLE_S = 60.0
REPOSITORY = Path(__file__).resolve().parents[2]
_READY_S = 180.0
_SAMPLE_S = 0.02


@dataclass(frozen=True)
class Reading:
    """What a process has at one moment."""

    rss_mib: float
    files: int
    threads: int


class Trunk:
    """A real `trunkline trunk serve`, sampled."""

    def __init__(
        self, process: subprocess.Popen[bytes], address: str, state_dir: Path, log: Path, pki: Pki | None
    ) -> None:
        self.process = process
        self.address = address
        self.state_dir = state_dir
        self.log = log
        self._tls = None if pki is None else pki.files("orchestrator")
        self._process = psutil.Process(process.pid)
        self._peak = 0
        self._over = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def reading(self) -> Reading:
        return Reading(self._process.memory_info().rss / MIB, self._process.num_fds(), self._process.num_threads())

    def peak_mib(self) -> float:
        """The highest resident size since this was asked last."""
        peak, self._peak = self._peak, 0
        return max(peak, self._process.memory_info().rss) / MIB

    def spilled(self) -> list[str]:
        return [str(path) for path in self.state_dir.glob("spill-*/*")]

    def channel(self) -> grpc.Channel:
        """As an orchestrator has it."""
        return open_channel(self.address, self._tls, [])

    def described(self) -> pb.TrunkDescription:
        with self.channel() as channel:
            told: pb.TrunkDescription = TrunkStub(channel).Describe(pb.DescribeRequest(), timeout=30)
            return told

    def stop(self) -> None:
        self._over.set()
        self._sampler.join()

    def _sample(self) -> None:
        while not self._over.wait(_SAMPLE_S):
            try:
                self._peak = max(self._peak, self._process.memory_info().rss)
            except psutil.NoSuchProcess:
                return


@contextmanager
def running(folder: Path, model: Path, pki: Pki | None) -> Iterator[Trunk]:
    """With `pki` it takes callers by its certificates, and sessions by ticket, alone."""
    state_dir, announce, log = folder / "state", folder / "address", folder / "log"
    command = [
        *(sys.executable, "-m", "trunkline", "trunk", "serve", "--model", str(model), "--listen", "127.0.0.1:0"),
        *("--head-layers", "1", "--tail-layers", "1", "--device", "cpu", "--threads", "1", "--batch-tokens", "512"),
        *("--state-dir", str(state_dir), "--announce-file", str(announce), "--max-sessions", str(MAX_SESSIONS)),
        *("--max-pending", "8", "--max-tokens", str(MAX_TOKENS), "--memory-budget", f"{BUDGET_MIB}M"),
        *("--spill-budget", "256M", "--sample-cache-mib", "1", "--grace-s", "1"),
    ]
    if pki is not None:
        tls = pki.files("trunk")
        command += ["--tls-certificate", str(tls.certificate), "--tls-key", str(tls.key), "--client-ca", str(tls.ca)]
        command += ["--ticket-signer", public_key_text(SIGNER_KEY)]
    with log.open("wb") as told:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=told, stderr=told)
    try:
        until_s = time.monotonic() + _READY_S
        while not announce.exists():
            if process.poll() is not None or time.monotonic() > until_s:
                raise RuntimeError(f"the trunk did not come up: {log.read_text()[-2000:]}")
            time.sleep(0.05)
        trunk = Trunk(process, announce.read_text().strip(), state_dir, log, pki)
        yield trunk
        trunk.stop()
        process.terminate()
        if process.wait(SETTLE_S) != 0:
            raise RuntimeError(f"the trunk ended with {process.returncode}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def tracebacks(said: str) -> list[str]:
    """What an unexpected error says last, each."""
    found, inside = [], False
    for line in said.splitlines():
        if line.startswith("Traceback"):
            inside = True
        elif inside and line and not line.startswith((" ", "\t")):
            found.append(line[:300])
            inside = False
    return found[:10]
