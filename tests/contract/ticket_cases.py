"""A ticket, its signer and its holder, for the tests of all that handle tickets."""

from __future__ import annotations

from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from contract.ticket import Ticket

SIGNER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SIGNER_KEY = SIGNER.public_key().public_bytes_raw()
HOLDER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
HOLDER_KEY = HOLDER.public_key().public_bytes_raw()
RENEWAL_KEY = bytes(range(2, 34))
ISSUED_AT = 1_780_000_000


def a_ticket(**changed: Any) -> Ticket:
    """For HOLDER, by SIGNER, as an orchestrator issues them, but for what is `changed`."""
    issued_at = changed.get("issued_at", ISSUED_AT)
    plain: dict[str, Any] = {
        "ticket_id": "0123456789abcdef" * 2,
        "run": "a-run",
        "round": 3,
        "attempt": 1,
        "client_id": "77",
        "holder": HOLDER_KEY,
        "certificate_key_sha256": "",
        "head_layers": 1,
        "tail_layers": 1,
        "model_fingerprint": "f" * 64,
        "adapter_sha256": "a" * 64,
        "trainable": "B",
        "max_sessions": 3,
        "max_steps": 30,
        "max_bytes": 10**9,
        "issued_at": issued_at,
        "expires_at": issued_at + 900,
        "round_ends_at": issued_at + 86_400,
        "signer": SIGNER_KEY,
    }
    return Ticket(**(plain | changed))
