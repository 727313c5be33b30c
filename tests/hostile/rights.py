"""Certificates and tickets of callers at a trunk that wants them. No torch: a process of them starts at once."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Any

import grpc

from contract import trunk_pb2 as pb
from contract.records import Trainable
from contract.ticket import Ticket, prove, signed_ticket
from contract.tls import TlsFiles
from contract.trunk_pb2_grpc import TrunkStub
from tests.contract.ticket_cases import HOLDER, SIGNER, a_ticket
from tests.pki import Pki


def files(keys: str, name: str) -> TlsFiles | None:
    """What `name` shows of itself; None where nobody shows anything."""
    return Pki(Path(keys)).files(name) if keys else None


def ticket_for(hello: pb.Hello, **changed: Any) -> Ticket:
    """The ticket that an orchestrator issues for such a session, but for what is `changed`."""
    trainable: Trainable = hello.trainable  # type: ignore[assignment]
    own: dict[str, Any] = {
        "ticket_id": secrets.token_hex(16),
        "run": hello.round.run,
        "round": hello.round.round,
        "attempt": hello.round.attempt,
        "client_id": hello.client_id,
        "head_layers": hello.model.head_layers,
        "tail_layers": hello.model.tail_layers,
        "model_fingerprint": hello.model.fingerprint,
        "adapter_sha256": hello.adapter_sha256,
        "trainable": trainable,
        "issued_at": int(time.time()),
    }
    return a_ticket(**(own | changed))


def admitted(channel: grpc.Channel, hello: pb.Hello) -> pb.Hello:
    """`hello` with a ticket of its own, and the proof for a challenge that the trunk at `channel` makes."""
    described: pb.TrunkDescription = TrunkStub(channel).Describe(pb.DescribeRequest(), timeout=60)
    return presented(hello, signed_ticket(ticket_for(hello), SIGNER), described.challenge)


def presented(hello: pb.Hello, ticket: bytes, challenge: bytes, holder: Any = HOLDER) -> pb.Hello:
    """`hello` with `ticket`, and the proof of `holder` for it."""
    told = pb.Hello()
    told.CopyFrom(hello)
    told.ticket, told.challenge, told.proof = ticket, challenge, prove(holder, ticket, challenge)
    return told
