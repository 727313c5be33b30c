"""The key that signs tickets for rounds' sessions at a trunk. It is made on first use and stays in the home."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from contract.errors import ConfigError, StorageError
from contract.identity import create_private_key, public_key_text, read_private_key
from storage.home import home_dir

KEY_FILE = "ticket.pem"


def open_ticket_key(path: Path | None = None) -> Ed25519PrivateKey:
    """The key in the file `path` (default: ticket.pem in the home directory), made there where there is none yet.

    Raises ConfigError where there is no usable key, StorageError where there can be no directory for it.
    """
    place = path if path is not None else home_dir() / KEY_FILE
    if not place.exists():
        try:
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make {place.parent} for the tickets' key: {error.strerror}") from error
        try:
            create_private_key(place)
        except ConfigError:
            if not place.exists():  # another process made it meanwhile: then it is as good as ours
                raise
    return read_private_key(place)


def signer_text(key: Ed25519PrivateKey) -> str:
    """The public line that a trunk is given as --ticket-signer."""
    return public_key_text(key.public_key().public_bytes_raw())
