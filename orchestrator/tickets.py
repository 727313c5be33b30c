"""Tickets for rounds' sessions, where the trunk takes sessions by ticket: issued with each order to train or to judge.

What a ticket allows follows from the run's settings, so that no client which keeps to them meets a limit.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from contract.config import RunConfig
from contract.errors import ConfigError
from contract.identity import public_key_text
from contract.records import Factor, RoundKey
from contract.ticket import ID_BYTES, MAX_COUNT, MAX_LIFE_S, MAX_ROUND_S, Ticket, signed_ticket
from orchestrator.ticket_key import open_ticket_key, signer_text
from orchestrator.trunk import ServedModel
from storage.store import Store

MOST_UNKNOWN_TOKENS = 100_000_000
"""What a client may send in a round where no setting bounds it: to judge all of its held-out rows, or drawn rows."""

_CROSSINGS = 4  # forward and backward, each there and back
_VALUE_BYTES = 4  # the widest codec is float32's own
_TOKEN_BYTES = 64  # what a token may cost besides its values: position, mask, scales, outliers
_ROW_BYTES = 4096  # what a row may cost besides its tokens: the frames of a microbatch of its own, both ways
_SESSION_BYTES = 1 << 20
_MARGIN = 2

Issue = Callable[[str, bytes], bytes]
"""Makes the ticket of a client (Flower's node id) whose public key is the one given."""


@dataclass(frozen=True, slots=True)
class TicketOffice:
    """Issues the tickets of one run; `served` is what the trunk says of itself, `now` the wall's clock."""

    key: Ed25519PrivateKey = field(repr=False)
    config: RunConfig
    served: ServedModel
    store: Store
    now: Callable[[], float] = time.time

    def for_round(self, key: RoundKey, factor: Factor, trunk_sha256: str, *, final: bool) -> Issue:
        """What makes the tickets of one attempt at a round, or, where it is `final`, of a judgement."""
        # Who was revoked since the cohort was drawn is bound to its key as before.
        enrolled = self.store.list_identities(include_revoked=True)
        certificates = {row.public_key: row.certificate_key_sha256 for row in enrolled}
        max_steps, max_bytes = session_limits(self.config, self.served.hidden_size, final=final)
        sessions = 1 + self.config.trunk_retries

        def issue(node_id: str, holder: bytes) -> bytes:
            issued_at = int(self.now())
            ticket = Ticket(
                ticket_id=secrets.token_hex(ID_BYTES),
                run=key.run,
                round=key.round,
                attempt=key.attempt,
                client_id=node_id,
                holder=holder,
                certificate_key_sha256=certificates.get(public_key_text(holder)) or "",
                head_layers=self.served.cut.head,
                tail_layers=self.served.cut.tail,
                model_fingerprint=self.served.fingerprint,
                adapter_sha256=trunk_sha256,
                trainable="none" if self.config.trunk_adapter == "frozen" else factor,
                max_sessions=sessions,
                max_steps=min(sessions * max_steps, MAX_COUNT),
                max_bytes=min(sessions * max_bytes, MAX_COUNT),
                issued_at=issued_at,
                expires_at=issued_at + MAX_LIFE_S,
                round_ends_at=issued_at + MAX_ROUND_S,
                signer=self.key.public_key().public_bytes_raw(),
            )
            return signed_ticket(ticket, self.key)

        return issue


def open_office(config: RunConfig, served: ServedModel, store: Store, address: str) -> TicketOffice | None:
    """The office for a run at the trunk `served`; None where that takes sessions without a ticket.

    The home's key signs, and is made where there is none yet. Raises ConfigError where the trunk takes other keys'
    tickets, and for a run in clear, in which no client says who it is.
    """
    if not served.ticket_signers:
        return None
    if config.secagg == "off":
        raise ConfigError(
            f"secagg is off, and the trunk at {address} takes sessions by ticket: a ticket is for a client's key, and "
            "in a run in clear no client shows one; set secagg to on, or use a trunk without --ticket-signer"
        )
    key = open_ticket_key()
    if (own := signer_text(key)) not in served.ticket_signers:
        raise ConfigError(
            f"the trunk at {address} takes tickets by {', '.join(served.ticket_signers)}, and this orchestrator signs "
            f"by {own}: start the trunk with --ticket-signer '{own}' too, as `trunkline pki ticket-key` prints it"
        )
    return TicketOffice(key, config, served, store)


def session_limits(config: RunConfig, hidden_size: int, *, final: bool) -> tuple[int, int]:
    """(steps, bytes) that one session of a round may come to, above what any client does that keeps to its settings.

    A row has a token to learn at least, so that a round in epochs has no more rows than tokens. Where no setting
    bounds the rows (all held-out ones are judged, or rows are drawn), MOST_UNKNOWN_TOKENS stands for them.
    """
    unknown = math.ceil(MOST_UNKNOWN_TOKENS / config.max_length)
    judged = config.eval_batches * config.per_device_train_batch_size if config.eval_batches else unknown
    if config.metrics == "off" or not config.eval_fraction:
        judged = 0
    steps = config.local_steps or config.max_trained_tokens()
    trained = config.local_steps * config.gradient_accumulation_steps * config.per_device_train_batch_size
    if config.dp == "example":
        trained = unknown
    elif not config.local_steps:
        trained = config.max_trained_tokens()
    if final:
        steps = trained = 0
    row_bytes = config.max_length * (_CROSSINGS * _VALUE_BYTES * hidden_size + _TOKEN_BYTES) + _ROW_BYTES
    return steps, _MARGIN * ((judged + trained) * row_bytes + _SESSION_BYTES)
