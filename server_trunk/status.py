"""What a trunk says of itself, asked over its own port; also what a readiness probe needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from contract.addresses import split_address
from contract.errors import ConnectionFailedError, DeadlineError, TrunklineError, error_named
from contract.tls import TlsFiles, open_channel, told_failure
from contract.trunk_pb2 import DescribeRequest, TrunkDescription
from contract.trunk_pb2_grpc import TrunkStub
from contract.wire import ERROR_KEY, PROTOCOL

ANSWER_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class TrunkStatus:
    """`ready` is False for a trunk that takes no new sessions, as when it is about to end."""

    address: str
    ready: bool
    open_sessions: int
    max_sessions: int
    protocol: int
    layers: str
    hidden_size: int
    dtype: str
    weights: str
    attention: str
    model_fingerprint: str
    torch: str
    transformers: str
    peft: str

    @property
    def speaks_ours(self) -> bool:
        """Whether it can be talked to by this installation."""
        return self.protocol == PROTOCOL


def ask(address: str, tls: TlsFiles | None = None) -> TrunkStatus:
    """Asked by TLS where `tls` is given. Raises ConfigError for an address or file that cannot be used,
    ConnectionFailedError, DeadlineError, AccessError and TrunklineError.
    """
    split_address("trunk", address)
    with open_channel(address, tls, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            told: TrunkDescription = TrunkStub(channel).Describe(DescribeRequest(), timeout=ANSWER_TIMEOUT_S)
            asked = health_pb2.HealthCheckRequest()
            health = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=ANSWER_TIMEOUT_S)
        except grpc.RpcError as error:
            _raise_named(error, address, tls)
    model = told.model
    return TrunkStatus(
        address=address,
        ready=health.status == health_pb2.HealthCheckResponse.SERVING,
        open_sessions=told.open_sessions,
        max_sessions=told.max_sessions,
        protocol=told.protocol,
        layers=f"{model.head_layers} to {told.layers - model.tail_layers - 1} of {told.layers}",
        hidden_size=told.hidden_size,
        dtype=model.dtype,
        weights=told.weights or "plain",
        attention=model.attn_implementation,
        model_fingerprint=model.fingerprint,
        torch=model.torch_version,
        transformers=model.transformers_version,
        peft=model.peft_version,
    )


def _raise_named(error: grpc.RpcError, address: str, tls: TlsFiles | None) -> NoReturn:
    code = cast(grpc.Call, error).code()
    details = " ".join((cast(grpc.Call, error).details() or "").split())
    trailer = dict(cast(Iterable[tuple[str, str]], cast(grpc.Call, error).trailing_metadata() or ()))
    if (cls := error_named(trailer.get(ERROR_KEY, ""))) is not None:
        raise cls(f"trunk at {address}: {details}") from None
    if code is grpc.StatusCode.UNAVAILABLE:
        raise ConnectionFailedError(
            f"no trunk answers at {address}{told_failure(details, by_tls=tls is not None)}"
        ) from None
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        raise DeadlineError(f"the trunk at {address} did not answer within {ANSWER_TIMEOUT_S:g} s") from None
    raise TrunklineError(f"what listens at {address} is no trunk: {code.name}: {details}") from None
