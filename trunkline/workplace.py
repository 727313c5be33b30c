"""What a run on this machine needs around it: a temporary directory, its processes, a trunk, a clean end."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from contract.config import RunConfig
from contract.errors import ConfigError, RoundError
from contract.output import talk
from contract.tls import VARIABLES
from storage.home import DATABASE_FILE_VARIABLE, DATABASE_VARIABLE, HOME_VARIABLE, database_url, home_dir
from trunkline.flower import LOOPBACK, flower_environment
from trunkline.processes import Daemon, Supervisor, ending_signals_interrupt

TRUNK_START_LIMIT_S = 600.0
# Ray's sockets lie some 70 characters below this directory, and a socket's path holds at most 107 bytes.
LONGEST_TEMPORARY_PATH = 32


@dataclass(frozen=True, slots=True)
class Workplace:
    """One run's temporary `directory` and the `supervisor` of its processes, whose logs lie in `logs`."""

    directory: Path
    supervisor: Supervisor

    @property
    def logs(self) -> Path:
        return self.supervisor.directory


@dataclass(frozen=True, slots=True)
class StartingTrunk:
    """A trunk server that loads its model meanwhile."""

    daemon: Daemon
    announcement: Path

    def address(self, supervisor: Supervisor) -> str:
        """HOST:PORT, once it is ready. Raises RoundError where it ended, ConfigError where it ended for a setting."""
        try:
            supervisor.wait_for(self.announcement.exists, self.daemon, "the trunk server", TRUNK_START_LIMIT_S)
        except RoundError:
            if self.daemon.process.returncode == ConfigError.exit_code:
                raise ConfigError(self.daemon.last_words()) from None
            raise
        return self.announcement.read_text(encoding="utf-8").strip()


@contextmanager
def open_workplace(torch_processes: int) -> Iterator[Workplace]:
    """A workplace for about `torch_processes` processes that compute at the same time, gone when the block ends.

    Every process that was started in it is ended, on any way out: SIGINT, SIGTERM and SIGHUP too, which raise
    KeyboardInterrupt in the block. The logs stay, and their place is told, only where an error ends it.
    """
    directory = Path(tempfile.mkdtemp(prefix="trunkline-", dir=_short_temporary_directory()))
    environment = flower_environment(directory, _threads_each(torch_processes))
    # The daemons run elsewhere: a home and a database given relative to here must stay the same ones.
    environment[HOME_VARIABLE] = str(home_dir().absolute())
    environment[DATABASE_VARIABLE] = _absolute(database_url())
    environment.pop(DATABASE_FILE_VARIABLE, None)
    for name in VARIABLES:  # a trunk that is met here is asked in clear: simulated sites have no certificates
        environment.pop(name, None)
    supervisor = Supervisor(directory / "logs", environment)
    keep = False
    try:
        with ending_signals_interrupt(), supervisor:
            yield Workplace(directory, supervisor)
    except Exception:
        keep = bool(supervisor.daemons)
        raise
    finally:
        if keep:
            talk(f"the logs of what ran are kept in {directory / 'logs'}")
        else:
            shutil.rmtree(directory, ignore_errors=True)


def start_trunk(workplace: Workplace, config: RunConfig, model: str) -> StartingTrunk:
    """Start a trunk server for `model` on a free loopback port, cut and typed as `config` says."""
    announcement = workplace.directory / "trunk-address"
    argv = [
        *(sys.executable, "-m", "trunkline", "trunk", "serve", "--model", model),
        *("--head-layers", str(config.head_layers), "--tail-layers", str(config.tail_layers)),
        *("--dtype", config.dtype, "--attn-implementation", config.attn_implementation),
        *("--listen", f"{LOOPBACK}:0", "--announce-file", str(announcement)),
        *("--state-dir", str(workplace.directory / "trunk"), "--grace-s", "1"),
    ]
    return StartingTrunk(workplace.supervisor.start("trunk", argv), announcement)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _threads_each(processes: int) -> int:
    """An even share of the cores, unless the user has said otherwise."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdigit() and int(told) > 0 else max(1, cores() // max(1, processes))


def _absolute(url: str) -> str:
    scheme, _, path = url.partition(":///")
    return f"{scheme}:///{Path(path).absolute()}" if scheme == "sqlite" and path else url


def _short_temporary_directory() -> str:
    usual = tempfile.gettempdir()
    return usual if len(usual) <= LONGEST_TEMPORARY_PATH and shlex.quote(usual) == usual else "/tmp"
