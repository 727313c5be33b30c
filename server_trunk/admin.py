"""The RPCs for the trunk's own operator: who works with it, and that it is to end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import grpc

from contract import trunk_pb2 as pb
from contract.certificates import party_of
from contract.errors import ConfigError
from contract.tls import peer_certificate
from contract.wire import LONGEST_GRACE_S, round_to_wire
from server_trunk.servicer import Context, abort
from server_trunk.sessions import SeenSession, SessionTable

logger = logging.getLogger("trunkline.server_trunk")

ADMIN_SERVICE = "trunkline.v1.TrunkAdmin"
_OPERATOR_LETTERS = 200


class AdminServicer:
    """Serves trunkline.v1.TrunkAdmin from the trunk's event loop.

    `drain` is told the seconds that open sessions get; it must return at once.
    """

    def __init__(self, table: SessionTable[Any, Any], drain: Callable[[float], None]) -> None:
        self._table = table
        self._drain = drain

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """The RPCs for a server."""
        return grpc.method_handlers_generic_handler(
            ADMIN_SERVICE,
            {
                "Sessions": grpc.unary_unary_rpc_method_handler(
                    self.sessions, pb.SessionsRequest.FromString, pb.SessionsReply.SerializeToString
                ),
                "Drain": grpc.unary_unary_rpc_method_handler(
                    self.drain, pb.DrainRequest.FromString, pb.DrainReply.SerializeToString
                ),
            },
        )

    async def sessions(self, request: pb.SessionsRequest, context: Context) -> pb.SessionsReply:
        return pb.SessionsReply(sessions=map(_told, self._table.seen()))

    async def drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainReply:
        grace_s = request.grace_s
        if not 0 <= grace_s <= LONGEST_GRACE_S:
            refusal = ConfigError(f"grace_s is {grace_s}; it must be 0 to {LONGEST_GRACE_S:g} seconds")
            await abort(context, refusal)
        who = request.operator[:_OPERATOR_LETTERS] or "somebody"
        shown = peer_certificate(context.auth_context())
        by = "" if shown is None else f", by the certificate of {party_of(shown, 'the caller').name}"
        logger.warning("%r has the trunk drained%s: %d sessions get %g s", who, by, self._table.taken, grace_s)
        self._drain(grace_s)
        return pb.DrainReply(open_sessions=self._table.taken)


def _told(session: SeenSession) -> pb.OpenSession:
    key, done = session.round_key, session.counters
    return pb.OpenSession(
        session_id=session.session_id,
        client_id=session.client_id,
        round=None if key is None else round_to_wire(key),
        open_s=session.open_s,
        idle_s=session.idle_s,
        steps=done.steps,
        tokens=done.tokens,
        received_bytes=done.received_bytes,
        sent_bytes=done.sent_bytes,
        pending=session.pending,
        quiet=session.quiet,
    )
