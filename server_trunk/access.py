"""Who may call what: by the role that the caller's TLS certificate names. Nobody may call what is not listed."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc

from contract.certificates import Role, party_of
from contract.errors import AccessError, ConfigError
from contract.tls import peer_certificate
from server_trunk.servicer import Context, abort

logger = logging.getLogger("trunkline.server_trunk")

_ALL_THREE = frozenset({Role.CLIENT, Role.ORCHESTRATOR, Role.OPERATOR})
_FOR_ORCHESTRATOR, _FOR_OPERATOR = frozenset({Role.ORCHESTRATOR}), frozenset({Role.OPERATOR})

ALLOWED: Mapping[str, frozenset[Role]] = {
    "/trunkline.v1.Trunk/Describe": _ALL_THREE,
    "/trunkline.v1.Trunk/Session": frozenset({Role.CLIENT}),
    "/trunkline.v1.Trunk/PutAdapter": _FOR_ORCHESTRATOR,
    "/trunkline.v1.Trunk/GetAdapter": _FOR_ORCHESTRATOR,
    "/trunkline.v1.Trunk/CommitRound": _FOR_ORCHESTRATOR,
    "/trunkline.v1.Trunk/Progress": _FOR_ORCHESTRATOR,
    "/trunkline.v1.Trunk/EndBefore": _FOR_ORCHESTRATOR,
    "/trunkline.v1.TrunkAdmin/Sessions": _FOR_OPERATOR,
    "/trunkline.v1.TrunkAdmin/Drain": _FOR_OPERATOR,
}
"""Methods by their full names. Health checks are for whoever has a certificate, whatever its role."""

_HEALTH = "/grpc.health.v1.Health/"

Method = Callable[[Any, Context], Awaitable[Any]]


class RoleGate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Lets a call through to its method where the caller's role may make it; ends it with AccessError otherwise.

    For servers that demand certificates. Methods MUST be coroutines, as all of this server's are.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler, name = await continuation(handler_call_details), handler_call_details.method
        if handler is None or name.startswith(_HEALTH):
            return handler
        kind = "_".join("stream" if one else "unary" for one in (handler.request_streaming, handler.response_streaming))
        return handler._replace(**{kind: _guarded(getattr(handler, kind), name)})


def require_role(shown: Mapping[str, Any], name: str) -> None:
    """Raise AccessError unless the certificate in gRPC's `auth_context` lets its owner call the method `name`."""
    method, allowed = name.rpartition("/")[2], ALLOWED.get(name, frozenset())
    needed = " or ".join(role.value for role in Role if role in allowed) or "nobody"
    certificate = peer_certificate(shown)
    if certificate is None:
        raise AccessError(f"{method} is for {needed}, and the caller showed no certificate")
    try:
        party = party_of(certificate, "the caller's certificate")
    except ConfigError as error:
        raise AccessError(f"{method} is for {needed}: {error}") from error
    if party.role not in allowed:
        raise AccessError(f"{method} is for {needed}; the caller's certificate is of role {party.role}, {party.name}")


def _guarded(method: Method, name: str) -> Method:
    async def guarded(request: Any, context: Context) -> Any:
        try:
            require_role(context.auth_context(), name)
        except AccessError as error:
            logger.warning("refused: %.1000s", error)
            await abort(context, error)
        return await method(request, context)

    return guarded
