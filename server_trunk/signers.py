"""Whose tickets a trunk takes, as its command line names them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from contract.errors import ConfigError
from contract.identity import parse_public_key
from contract.public_file import read_public_file

MAX_FILE_BYTES = 65_536


def ticket_signers(given: Sequence[str]) -> tuple[bytes, ...]:
    """The public keys, 32 bytes each, that `given` names: lines `ed25519:...`, or @FILE of such lines.

    Raises ConfigError for what is no such line, and for a file that holds none.
    """
    keys = [parse_public_key(line, "ticket-signer") for one in given for line in _lines(one)]
    return tuple(dict.fromkeys(keys))


def _lines(given: str) -> Iterator[str]:
    if not given.startswith("@"):
        yield given
        return
    path = Path(given[1:])
    data = read_public_file(path, MAX_FILE_BYTES, "the file of --ticket-signer,")
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"ticket-signer: {path} is over {MAX_FILE_BYTES} bytes")
    lines = [line.strip() for line in data.decode("utf-8", "replace").splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise ConfigError(f"ticket-signer: {path} names no key: without any, sessions would need no ticket")
    yield from found
