"""gRPC's health service, in which who watches is counted: a watch never ends by itself."""

from __future__ import annotations

from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2

_WATCHERS = 16


class Health(health.aio.HealthServicer):  # type: ignore[misc, name-defined]
    """Answers checks, and a bounded number of watches at once."""

    def __init__(self) -> None:
        super().__init__()
        self._watching = 0

    async def Watch(  # noqa: N802 (gRPC's name)
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        if self._watching >= _WATCHERS:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{_WATCHERS} watch this trunk's health already: check it instead"
            )
        self._watching += 1
        try:
            await super().Watch(request, context)
        finally:
            self._watching -= 1
