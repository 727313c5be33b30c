"""A file that anybody may read, and nobody may make this process read without end."""

from __future__ import annotations

from pathlib import Path

from contract.errors import ConfigError


def read_public_file(path: Path, most_bytes: int, what: str) -> bytes:
    """What is in the file `path`, up to one byte more than the `most_bytes` that it may have, so that too many show.

    Raises ConfigError, in which `what` tells which file it is, where it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(most_bytes + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {what} {path}: {error.strerror}") from error
