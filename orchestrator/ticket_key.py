"""The key that signs tickets for rounds' sessions at a trunk. It is made on first use and stays in the home."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from contract.identity import public_key_text
from orchestrator.home_key import open_home_key
from storage.home import home_dir

KEY_FILE = "ticket.pem"


def open_ticket_key(path: Path | None = None) -> Ed25519PrivateKey:
    """The key in the file `path` (default: ticket.pem in the home directory), made there where there is none yet.

    Raises ConfigError where there is no usable key, StorageError where there can be no directory for it.
    """
    return open_home_key(path or home_dir() / KEY_FILE, "the tickets'")


def signer_text(key: Ed25519PrivateKey) -> str:
    """The public line that a trunk is given as --ticket-signer."""
    return public_key_text(key.public_key().public_bytes_raw())
