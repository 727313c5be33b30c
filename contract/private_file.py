"""A file that holds a secret: read only where its owner alone can use it."""

from __future__ import annotations

import os
import shlex
import stat
from pathlib import Path

from contract.errors import ConfigError

MAX_KEY_FILE_BYTES = 16_384


def read_private_file(path: Path) -> bytes:
    """What is in the key file `path`. Raises ConfigError, naming the file and never what is in it.

    Refused: what is no plain file or over MAX_KEY_FILE_BYTES, and a file that its group or others can read or write.
    """
    try:
        # Not blocking: what lies there may be a pipe that nobody writes to.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())  # of what was opened: the name may change its meaning
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{path} is not a file; a key must be one")
            if status.st_mode & 0o077:
                raise ConfigError(
                    f"others than its owner can use the key file {path} (mode {stat.S_IMODE(status.st_mode):04o}): "
                    f"run `chmod 600 {shlex.quote(str(path))}`"
                )
            data = file.read(MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the key file {path}: {error.strerror}") from error
    if len(data) > MAX_KEY_FILE_BYTES:
        raise ConfigError(f"{path} is over {MAX_KEY_FILE_BYTES} bytes; no private key is that long")
    return data
