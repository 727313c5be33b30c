"""The key that vouches for this ledger: it signs the heads of its chains and the reports that are exported from it.

It is not the key of a roster or of a site. It is made on first use and stays with the ledger: whoever keeps a signed
head, or the public line, can hold the ledger to what it once said.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from contract.identity import public_key_text
from orchestrator.home_key import open_home_key
from storage.home import home_dir

KEY_FILE = "ledger-key.pem"


@dataclass(frozen=True, slots=True)
class LedgerKey:
    """An Ed25519 key that signs what a ledger says (storage.records.HeadSigner)."""

    key: Ed25519PrivateKey = field(repr=False)

    @property
    def public_key_text(self) -> str:
        """The public key as contract.identity.public_key_text writes it."""
        return public_key_text(self.key.public_key().public_bytes_raw())

    def sign(self, message: bytes) -> bytes:
        """The signature, 64 bytes."""
        return self.key.sign(message)


def open_ledger_key(path: Path | None = None) -> LedgerKey:
    """The key in the file `path` (default: ledger-key.pem in the home directory), made there where there is none yet.

    Raises ConfigError where there is no usable key, StorageError where there can be no directory for it.
    """
    return LedgerKey(open_home_key(path or home_dir() / KEY_FILE, "the ledger's"))
