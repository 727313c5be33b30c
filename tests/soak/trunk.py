"""The trunk of a soak: a real one at a fixed port, killed and started again, its memory sampled by life."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from scipy.stats import theilslopes

from tests.soak.family import Reading, reading
from trunkline.ports import reserve_port

_READY_S = 300.0
_SAMPLE_S = 1.0
_MOST_POINTS = 800


@dataclass
class Slope:
    """MiB a minute by Theil and Sen, with its 95 % interval, over so many minutes."""

    mib_per_min: float
    low: float
    high: float
    minutes: float


@dataclass
class SoakTrunk:
    """`trunkline trunk serve`, for as long as it is let live."""

    model: Path
    folder: Path
    lives: list[list[Reading]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._port = reserve_port()
        self._over = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def start(self) -> None:
        """Raises RuntimeError when it does not come up."""
        announce = self.folder / f"trunk-{len(self.lives)}"
        command = [
            *(sys.executable, "-m", "trunkline", "trunk", "serve", "--model", str(self.model)),
            *("--listen", self.address, "--announce-file", str(announce), "--state-dir", str(self.folder / "state")),
            *("--batch-tokens", "512", "--threads", "1", "--device", "cpu"),
        ]
        home = {"TRUNKLINE_HOME": str(self.folder / "trunk-home")}
        with (self.folder / "trunk.log").open("ab") as log:
            self._process = subprocess.Popen(command, env={**os.environ, **home}, stdout=log, stderr=log)
        until_s = time.monotonic() + _READY_S
        while not announce.exists():
            if self._process.poll() is not None or time.monotonic() > until_s:
                raise RuntimeError(f"the trunk did not come up, see {self.folder / 'trunk.log'}")
            time.sleep(0.1)
        self.lives.append([])
        if not self._sampler.is_alive():
            self._sampler.start()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def ended(self) -> int | None:
        """The exit code of one that nobody ended."""
        return None if self._process is None else self._process.poll()

    def stop(self) -> None:
        self._over.set()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self.kill()

    def slope(self) -> Slope | None:
        """How the last life's memory went over its last two thirds; None for too few samples."""
        life = self.lives[-1] if self.lives else []
        late = life[len(life) // 3 :]
        late = late[:: max(1, len(late) // _MOST_POINTS)]
        if len(late) < 30:
            return None
        minutes = [(one.at_s - late[0].at_s) / 60 for one in late]
        found = theilslopes([one.rss_mib for one in late], minutes, alpha=0.95)
        return Slope(float(found[0]), float(found[2]), float(found[3]), minutes[-1])

    def _sample(self) -> None:
        while not self._over.wait(_SAMPLE_S):
            process = self._process
            if process is not None and process.poll() is None:
                try:
                    found = reading(psutil.Process(process.pid), time.monotonic())
                except psutil.Error:
                    continue
                if found is not None:
                    self.lives[-1].append(found)
