"""The processes that a benchmark measures: a trunk server, and training workers driven a line at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from contract.openmp import waiting

START_TIMEOUT_S = 120.0
REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Reading:
    """What a worker tells of some steps; memory and wire are 0 where it tells nothing of them."""

    seconds: float
    cpu_seconds: float
    loss: float
    peak_bytes: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0


class Worker:
    """A training process that waits between readings."""

    def __init__(self, process: subprocess.Popen[str], trunk: psutil.Process | None = None) -> None:
        self._process = process
        self._trunk = trunk

    def read(self, steps: int) -> Reading:
        """Train `steps` steps. CPU seconds count the trunk's share too."""
        before_s = _cpu_seconds(self._trunk)
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the worker was started without pipes")
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the training worker ended with exit code {self._process.wait()}; see its error above")
        answer = json.loads(line)
        trunk_s = _cpu_seconds(self._trunk) - before_s
        return Reading(**{**answer, "cpu_seconds": answer["cpu_seconds"] + trunk_s})


def _cpu_seconds(process: psutil.Process | None) -> float:
    if process is None:
        return 0.0
    times = process.cpu_times()
    return float(times.user + times.system)


@contextmanager
def worker(
    model_dir: Path,
    threads: int,
    trunk_address: str = "",
    trunk: psutil.Process | None = None,
    *,
    module: str = "benchmarks.training_worker",
    side: str = "",
) -> Iterator[Worker]:
    """`module` as a process, told the model, its threads and, where they are given, the trunk and the `side`."""
    arguments = [str(model_dir), str(threads), *filter(None, (trunk_address, side))]
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | (waiting(os.environ) if trunk_address else {}),
    )
    with _stopped_at_end(process):
        yield Worker(process, trunk)


@contextmanager
def trunk_server(model_dir: Path, threads: int, directory: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A real `trunkline trunk serve` with cut (1, 1); yields its address and process."""
    announce = directory / "trunk-address"
    command = [sys.executable, "-m", "trunkline", "trunk", "serve", "--model", str(model_dir)]
    command += ["--head-layers", "1", "--tail-layers", "1", "--listen", "127.0.0.1:0", "--threads", str(threads)]
    command += ["--state-dir", str(directory / "trunk"), "--announce-file", str(announce)]
    process = subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | waiting(os.environ), stderr=subprocess.DEVNULL)
    with _stopped_at_end(process):
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not announce.exists():
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"the trunk did not start: {' '.join(command)}")
            time.sleep(0.05)
        yield announce.read_text().strip(), psutil.Process(process.pid)


@contextmanager
def _stopped_at_end(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
