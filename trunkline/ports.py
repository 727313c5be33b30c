"""Free TCP ports that two runs started at the same moment cannot both take."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path
from typing import IO

from contract.errors import CapacityError

# Below the range from which the kernel takes ports for outgoing connections, so that none of those can slip in
# between the look and the listen.
FIRST_PORT = 20_000
LAST_PORT = 32_000
TRIES = 200

_held: list[IO[bytes]] = []


def reserve_port(host: str = "127.0.0.1") -> int:
    """A port on `host` that nothing listens on and that no other Trunkline process on this machine has reserved.

    The reservation is a locked file and lasts as long as this process. Raises CapacityError if none is found.
    """
    directory = Path(tempfile.gettempdir()) / f"trunkline-ports-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    for _ in range(TRIES):
        port = random.SystemRandom().randint(FIRST_PORT, LAST_PORT)
        if _is_free(host, port) and _lock(directory / str(port)):
            return port
    raise CapacityError(f"no free port found on {host} between {FIRST_PORT} and {LAST_PORT} in {TRIES} tries")


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def _lock(path: Path) -> bool:
    handle = path.open("wb")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        return False
    _held.append(handle)
    return True
