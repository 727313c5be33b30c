"""The processes that a benchmark measures: trunks, and training workers driven a line at a time."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil

from contract.openmp import waiting

START_TIMEOUT_S = 300.0
READING_TIMEOUT_S = 900.0
REPOSITORY = Path(__file__).resolve().parent.parent

Side = Literal["unsplit", "split", "naive"]


@dataclass(frozen=True, slots=True)
class Order:
    """What a training worker is told to do: `steps` optimiser steps of `microbatches` batches each.

    `address` is of the trunk or the naive trunk. With `settle` the answer comes once the trunk has done all of it.
    """

    side: Side
    steps: int
    threads: int
    batch_size: int = 4
    tokens: int = 128
    microbatches: int = 1
    address: str = ""
    codec: str = "identity"
    settle: bool = False


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

    def read(self, work: int | Order) -> Reading:
        """Do `work`: an Order, or so many steps of the worker's one kind. CPU seconds count the trunk's share too."""
        before_s = cpu_seconds(self._trunk)
        self.begin(work)
        told = self.answer()
        trunk_s = cpu_seconds(self._trunk) - before_s
        return Reading(**{**asdict(told), "cpu_seconds": told.cpu_seconds + trunk_s})

    def begin(self, work: int | Order) -> None:
        if self._process.stdin is None:
            raise RuntimeError("the worker was started without pipes")
        self._process.stdin.write(f"{work if isinstance(work, int) else json.dumps(asdict(work))}\n")
        self._process.stdin.flush()

    def answer(self) -> Reading:
        """What came of the work last begun, its own CPU seconds. Raises RuntimeError when the worker ended or hangs."""
        stdout = self._process.stdout
        if stdout is None:
            raise RuntimeError("the worker was started without pipes")
        # One line comes for each line that went, so that nothing can be waiting in the file's own buffer.
        if not select.select([stdout], [], [], READING_TIMEOUT_S)[0]:
            raise RuntimeError(f"a training worker told nothing for {READING_TIMEOUT_S:g} s")
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"the training worker ended with exit code {self._process.wait()}; see its error above")
        return Reading(**json.loads(line))


def cpu_seconds(process: psutil.Process | None) -> float:
    if process is None:
        return 0.0
    times = process.cpu_times()
    return float(times.user + times.system)


def read_together(
    workers: Sequence[Worker], order: Order, servers: Sequence[psutil.Process] = ()
) -> tuple[float, float]:
    """(wall, CPU seconds) until all `workers`, which begin together, have done `order`; CPU counts `servers` too."""
    before_s = sum(cpu_seconds(one) for one in servers)
    started_s = time.perf_counter()
    for worker_ in workers:
        worker_.begin(order)
    answers = [worker_.answer() for worker_ in workers]
    wall_s = time.perf_counter() - started_s
    servers_s = sum(cpu_seconds(one) for one in servers) - before_s
    return wall_s, servers_s + sum(answer.cpu_seconds for answer in answers)


@contextmanager
def worker(
    model_dir: Path,
    threads: int,
    trunk_address: str = "",
    trunk: psutil.Process | None = None,
    *,
    module: str,
    side: str = "",
) -> Iterator[Worker]:
    """`module` as a process, told the model, its threads and, where they are given, the trunk and the `side`."""
    arguments = [str(model_dir), str(threads), *filter(None, (trunk_address, side))]
    with _running_worker(module, arguments, waits=bool(trunk_address)) as process:
        yield Worker(process, trunk)


@contextmanager
def training_workers(
    count: int,
    model_dir: Path,
    *,
    waits: bool,
    shape: str = "30m",
    device: str = "cpu",
    trunk: psutil.Process | None = None,
) -> Iterator[list[Worker]]:
    """`count` processes of benchmarks.training_worker. `waits`: idle threads give way to a trunk on the same cores.

    A reading of theirs alone counts the CPU seconds of `trunk` as theirs.
    """
    with ExitStack() as stack:
        arguments = [str(model_dir), shape, device]
        started = [
            stack.enter_context(_running_worker("benchmarks.training_worker", arguments, waits=waits))
            for _ in range(count)
        ]
        yield [Worker(process, trunk) for process in started]


@contextmanager
def _running_worker(module: str, arguments: Sequence[str], *, waits: bool) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | (waiting(os.environ) if waits else {}),
    )
    with _stopped_at_end(process):
        yield process


@contextmanager
def trunk_server(model_dir: Path, threads: int, directory: Path, *options: str) -> Iterator[tuple[str, psutil.Process]]:
    """A real `trunkline trunk serve` with cut (1, 1) and `options`; yields its address and process."""
    command = ["trunkline", "trunk", "serve", "--model", str(model_dir), "--listen", "127.0.0.1:0"]
    command += ["--head-layers", "1", "--tail-layers", "1", "--threads", str(threads)]
    command += ["--state-dir", str(directory / "trunk"), "--announce-file", str(directory / "trunk-address"), *options]
    with _serving(command, directory / "trunk-address", directory / "trunk.log") as served:
        yield served


@contextmanager
def naive_trunk_server(
    model_dir: Path, directory: Path, *, dtype: str = "float32", device: str = "cpu"
) -> Iterator[tuple[str, psutil.Process]]:
    """The naive trunk; yields its address and process."""
    announce = directory / "naive-address"
    command = ["benchmarks.naive_trunk", str(model_dir), str(announce), "--dtype", dtype, "--device", device]
    with _serving(command, announce, directory / "naive.log") as served:
        yield served


@contextmanager
def _serving(command: Sequence[str], announce: Path, log: Path) -> Iterator[tuple[str, psutil.Process]]:
    announce.unlink(missing_ok=True)
    with log.open("wb") as told:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=REPOSITORY, env=os.environ | waiting(os.environ), stderr=told
        )
    with _stopped_at_end(process):
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not announce.exists():
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"{' '.join(command)} did not start: {log.read_text()[-2000:]}")
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
