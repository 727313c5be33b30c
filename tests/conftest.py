"""A home of the tests' own, and trunks in processes of their own, which end with the tests."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

_READY_S = 120.0
_LONGEST = (
    *("integration/test_kills.py", "trunkline/test_resume.py", "integration/test_private_deployment.py"),
    *("trunkline/test_run.py", "orchestrator/test_simulation.py", "orchestrator/test_private_simulation.py"),
    *("simulation/test_seeds.py", "faults/test_matrix.py", "integration/test_ticketed_run.py"),
    *("hostile/test_hostile.py", "trunkline/pages/test_browser.py", "simulation/test_mutants.py"),
    *("contract/test_partition_parity.py", "aggregation/test_secure_sum.py"),
)
_REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    """A shell has what it starts in the background ignore SIGINT, and all that the tests start would do so, too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What collecting has imported and made stays: the collector of garbage would look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first: `make test` hands whole files to its processes, and a long one that
    begins last would keep the other cores idle."""
    rank = {Path(__file__).parent / name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the home of who runs it, which may hold another version's database."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRUNKLINE_HOME", str(tmp_path_factory.mktemp("home")))
        for name in ("DATABASE_URL", "DATABASE_URL_FILE", "TRUNK_CA", "TRUNK_CERTIFICATE", "TRUNK_KEY"):
            patch.delenv(f"TRUNKLINE_{name}", raising=False)
        yield


@dataclass(frozen=True)
class TrunkProcess:
    """`address` is HOST:PORT; `process` runs `trunkline trunk serve`; what it says goes to `log`."""

    address: str
    process: subprocess.Popen[bytes]
    log: Path
    state_dir: Path

    def kill(self) -> None:
        """End it without a goodbye."""
        self.process.kill()
        self.process.wait()


class Processes:
    """Starts this project's modules with a file to announce themselves in, and ends them all."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._count = 0
        self._started: list[subprocess.Popen[bytes]] = []

    def folder(self) -> Path:
        self._count += 1
        folder = self._root / f"process {self._count}"
        folder.mkdir()
        return folder

    def start(self, folder: Path, command: Sequence[str]) -> tuple[subprocess.Popen[bytes], str]:
        """Answers the process and what it wrote to FOLDER/announce."""
        environment = {**os.environ, "PYTHONPATH": str(_REPOSITORY), "OMP_NUM_THREADS": "1"}
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *command], cwd=folder, env=environment, stdout=log, stderr=log
            )
        self._started.append(process)
        announce, deadline = folder / "announce", time.monotonic() + _READY_S
        while not announce.is_file():
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{' '.join(command[:3])} did not come up:\n{(folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)
        return process, announce.read_text().strip()

    def end(self) -> None:
        for process in self._started:
            process.kill()
        for process in self._started:
            process.wait()


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    started = Processes(tmp_path_factory.mktemp("processes"))
    yield started
    started.end()


@pytest.fixture(scope="session")
def trunk_process(processes: Processes) -> Callable[..., TrunkProcess]:
    """`trunk_process(model_dir, head, tail, **options)`: a trunk served by the command line; lives until all tests end.

    Options are those of `trunkline trunk serve`, with underscores: `max_pending=2`.
    """

    def start(model_dir: Path | str, head: int, tail: int, **options: object) -> TrunkProcess:
        folder = processes.folder()
        given = {"listen": "127.0.0.1:0", "device": "cpu", "threads": 1, "state_dir": folder / "state", **options}
        flags = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        command = ["trunkline", "trunk", "serve", "--model", str(model_dir), "--head-layers", str(head)]
        command += ["--tail-layers", str(tail), "--announce-file", str(folder / "announce"), *flags]
        process, address = processes.start(folder, command)
        return TrunkProcess(address, process, folder / "log", Path(str(given["state_dir"])))

    return start


@pytest.fixture(scope="session")
def trunk_host(processes: Processes) -> Callable[..., dict[str, str]]:
    """`trunk_host({name: {model, head, tail, ...}})`: many trunks in one other process; answers their addresses.

    For tests of many models, which would otherwise wait for torch to be imported once for each.
    """

    def start(trunks: dict[str, dict[str, object]]) -> dict[str, str]:
        folder = processes.folder()
        (folder / "trunks.json").write_text(json.dumps({"state_dir": str(folder / "state"), "trunks": trunks}))
        _, announced = processes.start(folder, ["tests.trunk_host", str(folder)])
        addresses: dict[str, str] = json.loads(announced)
        return addresses

    return start
