"""What the trunk's operator asks of a trunk over its own port."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import grpc

from contract import trunk_pb2 as pb
from contract.addresses import split_address
from contract.tls import TlsFiles, open_channel
from contract.trunk_pb2_grpc import TrunkAdminStub
from contract.wire import message_limits, round_from_wire
from server_trunk.status import ANSWER_TIMEOUT_S, raise_named

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class SessionLine:
    """One open session. Of a quiet one no counts are told: they follow from its client's text.

    `open_s` is since its hello, `idle_s` since its client was last heard or answered, `pending` the forwards that wait
    for their backward.
    """

    client: str
    run: str | None
    round: int | None
    attempt: int | None
    open_s: float
    idle_s: float
    steps: int | None
    tokens: int | None
    received_bytes: int | None
    sent_bytes: int | None
    pending: int | None
    quiet: bool
    session_id: str


class TrunkOperator:
    """A connection by which a trunk's operator asks. Raises what server_trunk.status.ask does, or the trunk names."""

    def __init__(self, address: str, tls: TlsFiles | None = None) -> None:
        """Asks by TLS where `tls` is given."""
        split_address("trunk", address)
        self._address = address
        self._tls = tls
        self._channel = open_channel(address, tls, [*message_limits(), ("grpc.enable_http_proxy", 0)])
        self._stub = TrunkAdminStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def sessions(self) -> list[SessionLine]:
        """The open sessions, the oldest first."""
        reply: pb.SessionsReply = self._asked(
            lambda: self._stub.Sessions(pb.SessionsRequest(), timeout=ANSWER_TIMEOUT_S)
        )
        return [_line(session) for session in reply.sessions]

    def drain(self, grace_s: float, operator: str) -> int:
        """Have the trunk take no more sessions, and end `grace_s` seconds from now at the latest; how many are open."""
        request = pb.DrainRequest(grace_s=grace_s, operator=operator)
        reply: pb.DrainReply = self._asked(lambda: self._stub.Drain(request, timeout=ANSWER_TIMEOUT_S))
        return reply.open_sessions

    def _asked(self, ask: Callable[[], Answer]) -> Answer:
        try:
            return ask()
        except grpc.RpcError as error:
            raise_named(error, self._address, self._tls)


@contextmanager
def connected(address: str, tls: TlsFiles | None = None) -> Iterator[TrunkOperator]:
    """A TrunkOperator for as long as the block runs."""
    operator = TrunkOperator(address, tls)
    try:
        yield operator
    finally:
        operator.close()


def _line(session: pb.OpenSession) -> SessionLine:
    key = round_from_wire(session.round) if session.HasField("round") else None
    counts = (session.steps, session.tokens, session.received_bytes, session.sent_bytes, session.pending)
    steps, tokens, received_bytes, sent_bytes, pending = (None,) * 5 if session.quiet else counts
    return SessionLine(
        client=session.client_id,
        run=None if key is None else key.run,
        round=None if key is None else key.round,
        attempt=None if key is None else key.attempt,
        open_s=session.open_s,
        idle_s=session.idle_s,
        steps=steps,
        tokens=tokens,
        received_bytes=received_bytes,
        sent_bytes=sent_bytes,
        pending=pending,
        quiet=session.quiet,
        session_id=session.session_id,
    )
