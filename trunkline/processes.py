"""Start processes and leave none behind.

A `Supervisor` gives every process it starts a session of its own, a log file, and a marker in its environment that all
descendants inherit. Stopping asks the processes to end, then kills whatever still carries the marker, descends from a
started process or shares its session: an orphan that was re-parented (Ray's and Flower's helpers are) has no way out.
On Linux such orphans become this process's children, which reaps them (`trunkline.orphans`). The caller's Ctrl-C never
reaches the children by itself, so the order of the stop is ours. Where this process is killed outright, a small one
that it started (`trunkline.reaper`) kills what carries the marker.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType

import psutil

from contract.errors import DeadlineError, RoundError
from trunkline.orphans import Orphans

log = logging.getLogger("trunkline.trunkline")

MARKER = "TRUNKLINE_SUPERVISOR"
POLL_S = 0.05
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOG_TAIL_LINES = 12
PR_SET_CHILD_SUBREAPER = 36
REAPER_LIMIT_S = 30.0


@dataclass
class Daemon:
    """One started process: its name for people, its handle and where its output goes."""

    name: str
    process: subprocess.Popen[bytes]
    log_path: Path
    told_bytes: int = 0

    def alive(self) -> bool:
        """Whether it still runs. An ended process stays unreaped, so that its session's number is not used again."""
        if self.process.returncode is not None:
            return False
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def last_lines(self, count: int = LOG_TAIL_LINES) -> str:
        """The end of what it printed, without blank lines."""
        lines = [line for line in self.log_path.read_text(errors="replace").splitlines() if line.strip()]
        return "\n".join(lines[-count:])

    def new_lines(self) -> list[str]:
        """The whole lines that it printed since the last time it was asked."""
        with self.log_path.open("rb") as log_file:
            log_file.seek(self.told_bytes)
            new = log_file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.told_bytes += len(whole)
        return whole.decode(errors="replace").splitlines()

    def last_words(self) -> str:
        """Why it ended, as far as it said: its `error: ` line, or else the last lines, as one line."""
        lines = self.last_lines().splitlines()
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return " ".join(" ".join(errors[-1:] or lines[-3:]).split()) or "no output"


@dataclass
class Supervisor:
    """Owns the processes of one demo or run. Use as a context manager; leaving it stops everything.

    `directory` receives one `NAME.log` per process and is their working directory: a place that holds no Python
    package, because Ray puts the working directory before the app bundle on the import path.
    """

    directory: Path
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    grace_s: float = 3.0
    kill_s: float = 10.0
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    daemons: list[Daemon] = field(default_factory=list)
    reaper: subprocess.Popen[bytes] | None = None
    orphans: Orphans = field(default_factory=Orphans)

    def __enter__(self) -> Supervisor:
        self.directory.mkdir(parents=True, exist_ok=True)
        _adopt_orphans()
        self.reaper = _start_reaper(self.mark)
        self.orphans.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.stop()
        finally:
            self.orphans.__exit__()
            if self.reaper is not None:
                _dismiss(self.reaper)

    def start(self, name: str, argv: Sequence[str], environment: Mapping[str, str] | None = None) -> Daemon:
        """Start `argv` in its own session with no stdin; stdout and stderr go to `NAME.log`."""
        log_path = self.directory / f"{name}.log"
        with log_path.open("ab") as output:
            process = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                env={**self.environment, **(environment or {}), MARKER: self.mark},
                start_new_session=True,
            )
        daemon = Daemon(name, process, log_path)
        self.daemons.append(daemon)
        return daemon

    def end(self, daemon: Daemon) -> None:
        """End one process, by SIGKILL after `grace_s` seconds, and forget it; its log stays.

        What it started itself ends with everything else. DeadlineError where it outlives SIGKILL for `kill_s` seconds.
        """
        for ask, limit_s in ((daemon.process.terminate, self.grace_s), (daemon.process.kill, self.kill_s)):
            ask()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.process.wait(limit_s)
                self.daemons.remove(daemon)
                return
        raise DeadlineError(f"{daemon.name} did not end within {self.kill_s:g} s of being killed")

    def check(self, daemons: Iterable[Daemon] | None = None) -> None:
        """Raise RoundError with the end of its log if one of `daemons` (all, by default) is no longer running."""
        for daemon in self.daemons if daemons is None else daemons:
            if not daemon.alive():
                raise RoundError(f"{daemon.name} ended with code {daemon.process.wait()}: {daemon.last_words()}")

    def wait_for(self, ready: Callable[[], bool], daemon: Daemon, what: str, limit_s: float) -> None:
        """Wait until `ready()`; RoundError if `daemon` ends first, DeadlineError after `limit_s` seconds."""
        deadline = time.monotonic() + limit_s
        while not ready():
            # It may have said so and ended since the last look.
            if not daemon.alive() and ready():
                return
            self.check([daemon])
            if time.monotonic() > deadline:
                raise DeadlineError(f"{what} was not ready within {limit_s:.0f} s; its log is {daemon.log_path}")
            time.sleep(POLL_S)

    def family(self) -> list[psutil.Process]:
        """Every living process that this supervisor started, directly or not."""
        sessions = {daemon.process.pid for daemon in self.daemons if daemon.process.returncode is None}
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            if process.pid != os.getpid() and self._is_ours(process, sessions):
                for member in (process, *_descendants(process)):
                    found[member.pid] = member
        return [process for process in found.values() if _is_running(process)]

    def stop(self) -> None:
        """End the whole family: SIGTERM to each, then, after `grace_s` seconds, SIGKILL to all that remains."""
        with ignoring_signals():
            members: set[psutil.Process] = set()
            remaining = self._send_until_gone(signal.SIGTERM, self.grace_s, members)
            if remaining:
                log.info("killing %d processes that did not end by themselves", len(remaining))
                remaining = self._kill(members)
            for daemon in self.daemons:
                daemon.process.poll()
            for process in members - {*remaining}:
                _reap(process.pid, limit_s=1.0)

    def kill(self) -> None:
        """SIGKILL to the whole family at once: none of them lives to see another gone, and to act on it."""
        self._kill(set())

    def _kill(self, members: set[psutil.Process]) -> list[psutil.Process]:
        remaining = self._send_until_gone(signal.SIGKILL, self.kill_s, members)
        if remaining:
            log.error("processes %s could not be killed", sorted(process.pid for process in remaining))
        return remaining

    def _send_until_gone(
        self, number: signal.Signals, limit_s: float, members: set[psutil.Process]
    ) -> list[psutil.Process]:
        """Send `number` once to each member, those that appear meanwhile too; answers who is left at the limit.

        All that were seen are added to `members`.
        """
        deadline = time.monotonic() + limit_s
        told: set[psutil.Process] = set()
        while True:
            remaining = self.family()
            for process in set(remaining) - told:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(number)
            told.update(remaining)
            members.update(remaining)
            if not remaining or time.monotonic() > deadline:
                return remaining
            time.sleep(POLL_S)

    def _is_ours(self, process: psutil.Process, sessions: set[int]) -> bool:
        try:
            return os.getsid(process.pid) in sessions or process.environ().get(MARKER) == self.mark
        except (OSError, psutil.Error):
            return False


def _start_reaper(mark: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "trunkline.reaper", mark],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[1],
        env={name: value for name, value in os.environ.items() if name != MARKER},
        start_new_session=True,
    )


def _dismiss(reaper: subprocess.Popen[bytes]) -> None:
    """Let it end, now that it has nothing to do."""
    if reaper.stdin is not None:
        reaper.stdin.close()
    try:
        reaper.wait(REAPER_LIMIT_S)
    except subprocess.TimeoutExpired:
        reaper.kill()
        reaper.wait()


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _adopt_orphans() -> None:
    """Have the kernel give us the descendants whose parents end, where it can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _reap(pid: int, limit_s: float) -> None:
    """Take the exit status of a child that we adopted; whoever has another parent is that one's to reap.

    A process that was killed is gone from view a moment before it can be reaped.
    """
    deadline = time.monotonic() + limit_s
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(pid, os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
            time.sleep(POLL_S)


@contextlib.contextmanager
def ending_signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does, so that every way of ending cleans up.

    One that this process was started to ignore stays ignored: `nohup` asks for just that.
    """

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handlers(interrupt):
        yield


@contextlib.contextmanager
def ignoring_signals() -> Iterator[None]:
    """An impatient second Ctrl-C must not cut the clean-up short."""
    with _handlers(signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _handlers(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    heeded = [number for number in ENDING_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
